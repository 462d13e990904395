// Unicode's composed form (NFC), in which class names are compared.
#pragma once

#include <string>
#include <string_view>

namespace edge_bcs::app {

// The composed form of UTF-8.
std::string composed(std::string_view text);

}  // namespace edge_bcs::app
