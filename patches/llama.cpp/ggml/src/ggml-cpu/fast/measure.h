// Interface between the measurement of kernels (measure.cpp) and the choice of the faster ones (choose.cpp).

#pragma once

#include <chrono>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace fast {

using steady = std::chrono::steady_clock;

constexpr size_t N_ROUNDS  = 9;  // of a batch
constexpr int    ATTENTION = -1; // instead of a weight type

struct kind {
    int  type;
    bool has_many;

    // Return the type's name in capitals, as in GGUF's documentation, and the rows: "Q4_K/many".
    std::string name() const;
};

// Microseconds of each round, by form. An unsupported kind has the form "-", and an attempt's time in seconds is stored as "tried".
using times_by_form = std::map<std::string, std::vector<double>>;
using times_by_kind = std::map<std::string, times_by_form>;

// Return whether our kernels exist for the kind on this processor.
bool is_supported(const kind & k);

// Measure two batches of each kind. At the deadline, stop, even within a batch.
times_by_kind measure(const std::vector<kind> & kinds, int n_threads, steady::time_point deadline);

// Return whether other processes use this processor for more than half of 20 ms. If so, rounds would take too long.
bool is_crowded();

} // namespace fast
