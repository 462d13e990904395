#include "kernels/table.h"

namespace edge_bcs {

namespace variant = EDGE_BCS_KERNEL_NAMESPACE;

const ConvKernels EDGE_BCS_JOIN(conv_kernels_, EDGE_BCS_VARIANT) = {
    {variant::sparse_tasks, variant::sparse, variant::pack_tasks, variant::pack, variant::dense_tasks,
     variant::dense},
    variant::gradient_tasks,
    variant::gradient,
    variant::dense_gradient_tasks,
    variant::dense_gradient,
    variant::depthwise,
    variant::depthwise_products,
};

}  // namespace edge_bcs
