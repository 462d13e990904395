// The kernels of this machine's instruction set, apart from the convolutions' (isa.h).
#pragma once

#include "kernels/normal.h"
#include "kernels/probe.h"
#include "kernels/rows.h"

namespace edge_bcs {

const RowKernels& row_kernels();
const NormalKernels& normal_kernels();
const ProbeKernels& probe_kernels();

}  // namespace edge_bcs
