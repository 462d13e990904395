// Options that several commands have.
#pragma once

#include <array>
#include <string_view>

#include "app/options.h"

namespace edge_bcs::app {

inline constexpr OptionSpec data_option{
    "--data", "PATH|digits",
    "A folder, or a .tar, with a folder of images (JPEG, PNG) for each class, an "
    ".npz of u8 images, or digits, which comes with "
    "edge-bcs-run. Required."};
inline constexpr OptionSpec class_names_option{"--class-names", "A,B,…|FILE",
                                               "Names of the network's outputs in the order of the labels."};
inline constexpr OptionSpec memory_option{
    "--memory", "SIZE", "Most bytes that the arena may take, such as 6MiB; default: the artifact's budget."};
inline constexpr OptionSpec threads_option{"--threads", "N",
                                           "Threads that compute; default: one for each processor."};
inline constexpr OptionSpec engine_option{"--engine", "native",
                                          "Taken for the sake of `edge-bcs`; there is no other here."};
inline constexpr OptionSpec on_bad_option{
    "--on-bad", "stop|skip",
    "What an image file that cannot be used does: stop ends the command before it begins (the default); skip "
    "leaves the image out and lists it."};

inline constexpr OptionSpec trust_key_option{
    "--trust-key", "FILE",
    "Public key (Ed25519, PEM): refuse an artifact that was not signed with it. May be repeated: one of them "
    "must fit. "
    "Without it, the files of the environment variable EDGE_BCS_TRUST_KEY."};
inline constexpr OptionSpec min_release_option{
    "--min-release", "N", "With --trust-key: refuse an artifact with a lower release number or none."};

inline constexpr std::array<std::string_view, 2> stop_or_skip{"stop", "skip"};

}  // namespace edge_bcs::app
