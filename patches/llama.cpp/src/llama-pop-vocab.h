// tokenizing in bounded time and stack, and stopped by whoever asked for it

#pragma once

#include "llama-vocab.h"

#include <algorithm>
#include <cstddef>
#include <regex>
#include <string>
#include <vector>

// to be called with each piece of work: ends llama_pop_tokenize() by an exception where its callback wants that
void llama_pop_tick();

// those of the special tokens that a text spells out. a longer text is gone through once, not once for each of thousands
std::vector<llama_token> llama_pop_spelled(const llama_vocab & vocab, const std::vector<llama_token> & special, const std::string & text);

// as std::regex_iterator, but looks at LLAMA_POP_LONGEST_MATCH characters at a time. std::regex calls itself for each
// character of a match, and one of 26,000 is more than a stack of 8 MiB holds. longer ones are cut
static const ptrdiff_t LLAMA_POP_LONGEST_MATCH = 8192;

template <typename It, typename Regex, typename Found>
void llama_pop_each_match(It first, It last, const Regex & expr, Found found) {
    std::match_results<It> match;
    auto flags = std::regex_constants::match_not_null;

    for (It at = first; at != last; flags |= std::regex_constants::match_prev_avail) {
        llama_pop_tick();

        const It end = at + std::min(LLAMA_POP_LONGEST_MATCH, last - at);
        if (!std::regex_search(at, end, match, expr, flags)) {
            at = end;
            continue;
        }
        // behind a gap its end may be that of the part
        if (match[0].first != at && match[0].second - at > LLAMA_POP_LONGEST_MATCH/2) {
            at = match[0].first;
            continue;
        }
        found(match[0].first - first, match.length());
        at = match[0].second;
    }
}
