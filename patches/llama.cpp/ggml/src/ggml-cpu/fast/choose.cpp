// Choice between our kernels and llama.cpp's by their times (measure.cpp), which a file in the user's cache folder keeps.

#include "measure.h"

#include "fast.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace fast {

namespace {

//
// rule
//

// Other processes make some rounds slower and none faster. A form therefore counts as faster only if, in each of two batches, it is 5 % faster
// in all rounds but one, and its median is 5 % below the other form's fastest round. tests/unit/engine/test_kernel_choice.py simulates this
// rule.
constexpr double CLEARLY = 1.05;
constexpr size_t MAX_LOST = 1; // rounds of a batch
// On a busy machine, the median was up to 1.01 times the fastest round in half of the batches, and up to 1.16 times in 90 %.
constexpr double MAX_SPREAD = 1.25;

using batch = std::vector<double>;

double median(batch times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

double fastest(const batch & times) {
    return *std::min_element(times.begin(), times.end());
}

std::vector<batch> batches(const times_by_form & times, const char * form) {
    const auto found = times.find(form);
    if (found == times.end() || found->second.size() != 2 * N_ROUNDS) {
        return {};
    }
    const auto begin = found->second.begin();
    return { batch(begin, begin + N_ROUNDS), batch(begin + N_ROUNDS, begin + 2 * N_ROUNDS) };
}

bool is_complete(const times_by_form & times) {
    return times.count("-") || (!batches(times, "ours").empty() && !batches(times, "llama.cpp").empty());
}

// Return false if other processes made many rounds slower.
bool is_calm(const times_by_form & times) {
    for (const char * form : { "ours", "llama.cpp" }) {
        for (const batch & b : batches(times, form)) {
            if (median(b) > MAX_SPREAD * fastest(b)) {
                return false;
            }
        }
    }
    return true;
}

bool wins(const batch & one, const batch & other) {
    size_t n_lost = 0;
    for (size_t i = 0; i < N_ROUNDS; i++) {
        n_lost += one[i] * CLEARLY >= other[i];
    }
    return n_lost <= MAX_LOST && median(one) * CLEARLY < fastest(other);
}

bool is_faster(const times_by_form & times, const char * one, const char * other) {
    const auto a = batches(times, one), b = batches(times, other);
    return !a.empty() && !b.empty() && is_calm(times) && wins(a[0], b[0]) && wins(a[1], b[1]);
}

// The form that computes a kind unless the other one is faster.
const char * default_form() { return ggml_pop_must_be_chosen() ? "llama.cpp" : "ours"; }
const char * other_form()   { return ggml_pop_must_be_chosen() ? "ours" : "llama.cpp"; }

// Return whether `one` is not clearly slower than `other`. Delays by other processes can only make it seem slower.
bool is_as_fast(const batch & one, const batch & other) {
    return median(one) <= CLEARLY * fastest(other);
}

// Return whether another measurement would probably give the same choice.
bool is_decided(const times_by_form & times) {
    const auto a = batches(times, default_form()), b = batches(times, other_form());
    return times.count("-") || is_faster(times, other_form(), default_form()) ||
           (is_complete(times) && is_as_fast(a[0], b[0]) && is_as_fast(a[1], b[1]));
}

// Return the kinds that other_form() computes, after the word "only" if our kernels must be chosen.
std::string choose(const times_by_kind & kinds) {
    std::string choice = ggml_pop_must_be_chosen() ? "only" : "";
    for (const auto & [name, times] : kinds) {
        if (is_faster(times, other_form(), default_form())) {
            choice += (choice.empty() ? "" : " ") + name;
        }
    }
    return choice;
}

// Return a line for each kind: "Q4_K/many: llama.cpp 0.92 ms, ours 0.53 ms (ours: 1.00 times the fastest)".
std::string summary(const times_by_kind & kinds) {
    std::ostringstream text;
    text.precision(2);
    text << std::fixed;
    for (const auto & [name, times] : kinds) {
        if (is_complete(times) && !times.count("-")) {
            const double theirs = median(times.at("llama.cpp")), ours = median(times.at("ours"));
            text << '\n' << name << ": llama.cpp " << theirs / 1000 << " ms, ours " << ours / 1000 << " ms (ours: "
                 << ours / std::max(1.0, std::min(ours, theirs)) << " times the fastest)";
        }
    }
    return text.str();
}

//
// file
//

using std::chrono::milliseconds;

constexpr milliseconds OPENING_LIMIT(1000);
constexpr milliseconds ALL_LIMIT(60000); // all kinds take 2 to 10 s on an idle machine

// While opening models, a kind is measured up to 3 times, and at most once in 10 minutes.
constexpr size_t MAX_ATTEMPTS = 3;
constexpr double RETRY_SECONDS = 600;

// Return whether opening a model must not measure the kind (again).
bool is_settled(const times_by_form & times) {
    const auto tried = times.find("tried");
    if (is_decided(times) || tried == times.end() || tried->second.empty()) {
        return is_decided(times);
    }
    const double seconds = (double) std::time(nullptr) - tried->second.back(); // negative if the clock was set back
    return tried->second.size() >= MAX_ATTEMPTS || (seconds >= 0 && seconds < RETRY_SECONDS);
}

// If a form has several lines, the last one is used. Lines with "tried" are combined.
times_by_kind parse(const std::string & text) {
    times_by_kind found;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string name, form;
        words >> name >> form;
        batch & times = found[name][form];
        if (form != "tried") {
            times.clear();
        }
        for (double us; words >> us;) {
            times.push_back(us);
        }
    }
    return found;
}

std::string as_text(const times_by_kind & kinds) {
    std::ostringstream text;
    text.precision(1);
    text << std::fixed;
    for (const auto & [name, forms] : kinds) {
        for (const auto & [form, times] : forms) {
            text << name << ' ' << form;
            for (const double us : times) {
                text << ' ' << us;
            }
            text << '\n';
        }
    }
    return text.str();
}

std::string read_file(const std::filesystem::path & path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// Write next to the file and rename, so that another process reads either all lines or none. Return false if the file cannot be written.
bool write_file(const std::filesystem::path & path, const std::string & text) {
    std::error_code error;
    std::filesystem::create_directories(path.parent_path(), error);
    auto temporary = path;
    temporary += '.' + std::to_string(steady::now().time_since_epoch().count()); // unlike another process's
    std::ofstream file(temporary, std::ios::binary);
    file << text;
    file.close();
    if (file) {
        std::filesystem::rename(temporary, path, error);
    }
    const bool is_written = file && !error;
    std::filesystem::remove(temporary, error);
    return is_written;
}

// Add lines to the file, which another process may have changed. Return false if the file cannot be written.
bool add_to_file(const std::filesystem::path & path, const times_by_kind & kinds) {
    std::string text = read_file(path);
    if (!text.empty() && text.back() != '\n') {
        text += '\n';
    }
    return write_file(path, text + as_text(kinds));
}

std::vector<kind> kinds_of(const std::string & words, bool has_many) {
    std::vector<kind> found;
    std::istringstream all(words);
    for (std::string word; all >> word;) {
        const int type = word == "attention" ? ATTENTION : atoi(word.c_str());
        if (type == ATTENTION || (type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type) > 0)) { // ggml removed some types
            if (has_many) {
                found.push_back({ type, true });
            }
            found.push_back({ type, false });
        }
    }
    return found;
}

// Remove the kinds that our kernels do not support, and return them.
times_by_kind take_unsupported(std::vector<kind> & kinds) {
    times_by_kind found;
    const auto first = std::stable_partition(kinds.begin(), kinds.end(), is_supported);
    for (auto k = first; k != kinds.end(); k++) {
        found[k->name()]["-"];
    }
    kinds.erase(first, kinds.end());
    return found;
}

times_by_kind measure_all(int n_threads, const std::filesystem::path & path) {
    std::string words = "attention";
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        words += ' ' + std::to_string(type);
    }
    auto kinds = kinds_of(words, true);
    auto found = take_unsupported(kinds);
    found.merge(measure(kinds, n_threads, steady::now() + ALL_LIMIT));
    write_file(path, as_text(found));
    return found;
}

// Measure the kinds that are not settled. An attempt is stored first, so nothing is measured without permission to write.
times_by_kind measure_missing(int n_threads, std::vector<kind> kinds, const std::filesystem::path & path) {
    const auto deadline = steady::now() + OPENING_LIMIT;
    auto known = parse(read_file(path));
    kinds.erase(std::remove_if(kinds.begin(), kinds.end(), [&](const kind & k) { return is_settled(known[k.name()]); }), kinds.end());
    auto found = take_unsupported(kinds);
    for (const kind & k : kinds) {
        found[k.name()]["tried"] = batch(1, (double) std::time(nullptr));
    }
    if (found.empty() || !add_to_file(path, found) || kinds.empty() || is_crowded()) {
        return known;
    }
    found = measure(kinds, n_threads, deadline);
    for (auto i = found.begin(); i != found.end();) {
        i = is_decided(i->second) ? std::next(i) : found.erase(i);
    }
    add_to_file(path, found);
    return parse(read_file(path));
}

std::string choose(int n_threads, const std::string & words, const std::filesystem::path & path) {
    if (!is_supported({ GGML_TYPE_Q8_0, true })) { // we have no kernels for this processor
        return "";
    }
    // With many rows, llama.cpp's results depend on the number of rows. If its kernels replaced ours, a prompt's results
    // would depend on its batches, so only the user's request (all) measures these kinds. If ours replace llama.cpp's, no guarantee is lost.
    const bool has_many = ggml_pop_must_be_chosen();
    const auto known = words == "all" ? measure_all(n_threads, path) : measure_missing(n_threads, kinds_of(words, has_many), path);
    return choose(known) + summary(known);
}

} // namespace

} // namespace fast

const char * ggml_pop_choose(int n_threads, const char * kinds, const char * path) {
    static thread_local std::string found;
    try {
        found = fast::choose(n_threads, kinds, std::filesystem::u8path(path));
    } catch (const std::exception & error) { // such as a lack of memory
        GGML_LOG_WARN("%s: %s\n", __func__, error.what());
        found.clear();
    }
    return found.c_str();
}
