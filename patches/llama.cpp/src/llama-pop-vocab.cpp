// interruptible tokenizing in bounded time and stack, see llama-pop-vocab.h

#include "llama-pop-vocab.h"
#include "llama-pop.h"

#include "llama-impl.h"

#include <exception>
#include <limits>
#include <map>
#include <set>

namespace {

struct stopped {};

struct trie {
    std::map<char, trie>     next;
    std::vector<llama_token> ends;
};

}

static const uint32_t CHECK_INTERVAL = 4096; // calls between two callbacks: a few milliseconds

static thread_local ggml_abort_callback should_stop = nullptr;
static thread_local void *              stop_data   = nullptr;
static thread_local uint32_t            n_calls     = 0;

void llama_pop_check_stop() {
    if (should_stop && ++n_calls % CHECK_INTERVAL == 0 && should_stop(stop_data)) {
        throw stopped();
    }
}

std::vector<llama_token> llama_pop_find_special(const llama_vocab & vocab, const std::vector<llama_token> & special, const std::string & text) {
    if (text.size() < 1024) {
        return special;
    }

    trie root;
    for (const auto token : special) {
        trie * node = &root;
        for (const char c : vocab.get_token_data(token).text) {
            node = &node->next[c];
        }
        node->ends.push_back(token);
    }

    std::set<llama_token> found;
    for (size_t start = 0; start < text.size(); ++start) {
        llama_pop_check_stop();
        const trie * node = &root;
        for (size_t at = start; at < text.size(); ++at) {
            const auto next = node->next.find(text[at]);
            if (next == node->next.end()) {
                break;
            }
            node = &next->second;
            found.insert(node->ends.begin(), node->ends.end());
        }
    }

    std::vector<llama_token> occurring; // in the order of `special`
    for (const auto token : special) {
        if (found.count(token)) {
            occurring.push_back(token);
        }
    }
    return occurring;
}

int32_t llama_pop_tokenize(const llama_vocab * vocab, const char * text, int32_t n_text, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special, ggml_abort_callback callback, void * data) {
    should_stop = callback;
    stop_data   = data;
    n_calls     = 0;

    int32_t n = std::numeric_limits<int32_t>::min();
    try {
        n = vocab->tokenize(text, n_text, tokens, n_tokens_max, add_special, parse_special);
    } catch (const stopped &) {
    } catch (const std::exception & error) {
        LLAMA_LOG_ERROR("%s: the vocabulary is damaged: %s\n", __func__, error.what());
    }

    should_stop = nullptr;
    return n;
}
