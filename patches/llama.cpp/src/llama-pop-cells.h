// prefill-only pruning: rows of a ubatch in the cells that they have, see llama-pop.h

#pragma once

#include "llama-batch.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"

// both are null where the memory is another one: recurrent states, several kinds of cells
struct llama_pop_caches {
    llama_kv_cache * base = nullptr;
    llama_kv_cache * swa  = nullptr; // of the layers with a sliding window, null: there are none
};

llama_pop_caches llama_pop_get_caches(llama_memory_i * memory);

// the cache of the layers with a sliding window or of the others that a ubatch is placed in, null: the memory has none
const llama_kv_cache_context * llama_pop_find_cache(const llama_memory_context_i * mctx, bool is_swa);

// the cell of a position, -1: the sequence has no such position
int64_t llama_pop_find_cell(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos pos);

// where the rows of a ubatch are in each cache, and how many of the cells they may attend to
struct llama_pop_places {
    llama_kv_cache::slot_info base{};
    llama_kv_cache::slot_info swa{};

    uint32_t n_kv_base = 0;
    uint32_t n_kv_swa  = 0;
};

// the places of some rows of the ubatch that the memory has just placed
llama_pop_places llama_pop_pick_places(const llama_memory_context_i & whole, const std::vector<int32_t> & rows);

// a context for rows that have their cells, to be applied while llama_pop_in_place lives
llama_memory_context_ptr llama_pop_use_places(llama_memory_i * memory, llama_pop_places places, const llama_ubatch & ubatch);

// while it lives nothing is placed
struct llama_pop_in_place {
    llama_pop_in_place(llama_memory_i * memory, const llama_pop_places & places);
    ~llama_pop_in_place();

    const llama_pop_caches kv;
};

// a ubatch of some rows of another, as many of each of its sequences where these are equally long
llama_ubatch llama_pop_pick_rows(const llama_ubatch & whole, const std::vector<int32_t> & rows, int64_t n_embd_inp);
