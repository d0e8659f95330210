// prefill-only pruning: memory contexts for rows that already have cells, see llama-pop.h

#pragma once

#include "llama-batch.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"

// both are null for other memories: recurrent states, several kinds of cells
struct llama_pop_caches {
    llama_kv_cache * base = nullptr;
    llama_kv_cache * swa  = nullptr; // for layers with a sliding window, null if there are none
};

llama_pop_caches llama_pop_get_caches(llama_memory_i * memory);

// return the KV cache of a ubatch for layers with a sliding window (is_swa) or without. null if the memory has none
const llama_kv_cache_context * llama_pop_find_cache(const llama_memory_context_i * mctx, bool is_swa);

// return the cell of a position, -1 if the sequence lacks the position
int64_t llama_pop_find_cell(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos pos);

// return the slot of rows that already have cells, empty if one has none
llama_kv_cache::slot_info llama_pop_find_slot(const llama_kv_cache & kv, llama_seq_id seq_id, const llama_pos * pos, int32_t n);

// return the number of cells that the row of a cell may attend to, rounded as in llama_kv_cache::get_n_kv(). so a pass over a
// prompt's first rows has the same shape before and after the other rows are read
uint32_t llama_pop_count_cells(const llama_kv_cells & cells, uint32_t cell);

// drop the snapshots of rows that are computed again
void llama_pop_forget_snapshots(const llama_kv_cells & cells, const llama_kv_cache::slot_info & slots);

// the cells of a ubatch's rows in each cache, and the number of cells they may attend to
struct llama_pop_places {
    llama_kv_cache::slot_info base{};
    llama_kv_cache::slot_info swa{};

    uint32_t n_kv_base = 0;
    uint32_t n_kv_swa  = 0;
};

// return the places of some rows of the ubatch that was just placed
llama_pop_places llama_pop_pick_places(const llama_memory_context_i & whole, const std::vector<int32_t> & rows);

// return a memory context for rows that already have cells. apply it within the scope of llama_pop_in_place
llama_memory_context_ptr llama_pop_use_places(llama_memory_i * memory, llama_pop_places places, const llama_ubatch & ubatch);

// disables the placement of rows within its scope
struct llama_pop_in_place {
    llama_pop_in_place(llama_memory_i * memory, const llama_pop_places & places);
    ~llama_pop_in_place();

    const llama_pop_caches kv;
};

// return a ubatch of the given rows. if sequences of the whole ubatch have equal lengths, the rows must have, too
llama_ubatch llama_pop_pick_rows(const llama_ubatch & whole, const std::vector<int32_t> & rows, int64_t n_embd_inp);
