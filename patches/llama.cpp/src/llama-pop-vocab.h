// interruptible tokenizing in bounded time and stack

#pragma once

#include "llama-vocab.h"

#include <algorithm>
#include <cstddef>
#include <regex>
#include <string>
#include <vector>

// called regularly while tokenizing. throws out of llama_pop_tokenize() if the callback requests a stop
void llama_pop_check_stop();

// return the special tokens that occur in the text. long texts are searched once instead of once per special token
std::vector<llama_token> llama_pop_find_special(const llama_vocab & vocab, const std::vector<llama_token> & special, const std::string & text);

// std::regex_iterator over parts of LLAMA_POP_MAX_MATCH characters: std::regex recurses for each character of a match, and 26,000
// characters overflow a stack of 8 MiB. longer matches are cut
static const ptrdiff_t LLAMA_POP_MAX_MATCH = 8192;

template <typename It, typename Regex, typename Found>
void llama_pop_for_each_match(It first, It last, const Regex & expr, Found found) {
    std::match_results<It> match;
    auto flags = std::regex_constants::match_not_null;

    for (It at = first; at != last; flags |= std::regex_constants::match_prev_avail) {
        llama_pop_check_stop();

        const It end = at + std::min(LLAMA_POP_MAX_MATCH, last - at);
        if (!std::regex_search(at, end, match, expr, flags)) {
            at = end;
            continue;
        }
        // after a gap, the end of the part may have cut the match: search again from its start
        if (match[0].first != at && match[0].second - at > LLAMA_POP_MAX_MATCH/2) {
            at = match[0].first;
            continue;
        }
        found(match[0].first - first, match.length());
        at = match[0].second;
    }
}
