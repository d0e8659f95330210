// prefill-only pruning: rows of an edited prompt move within the KV cache, and rows are decoded again in place, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

//
// cells
//

// an edit of one cache: row i gets the cell dst[i], and the data of the cell src[i] if from[i] >= 0
struct cache_edit {
    std::vector<uint32_t> src;
    std::vector<uint32_t> dst;
};

// return the reason why a cache cannot hold the edited rows, empty if it can
static std::string plan_edit(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos start, const std::vector<llama_pos> & from, cache_edit & edit) {
    for (const llama_pos pos : from) {
        const int64_t cell = pos < 0 ? 0 : llama_pop_find_cell(cells, seq_id, pos);
        if (cell < 0) {
            return format("position %d has no row", pos);
        }
        edit.src.push_back(cell);
    }
    // ascending, so that the rows of a context's only sequence have the cells of a fresh prompt
    for (uint32_t i = 0; i < cells.size() && edit.dst.size() < from.size(); ++i) {
        if (cells.is_empty(i) || (cells.seq_count(i) == 1 && cells.seq_has(i, seq_id) && cells.pos_get(i) >= start)) {
            edit.dst.push_back(i);
        }
    }
    return edit.dst.size() == from.size() ? "" : "there are not enough cells";
}

//
// data
//

// copy n pieces of a tensor, from index src[i] to index dst[i] where from[i] >= 0. piece j is at offset + j*size
static void move_pieces(ggml_tensor * t, size_t offset, size_t size, const cache_edit & edit, const std::vector<llama_pos> & from) {
    std::vector<uint8_t> data(from.size()*size);

    // calls f with each range [i, i + n) of consecutive cells
    const auto for_each_range = [&](const std::vector<uint32_t> & cells, const auto & f) {
        for (size_t i = 0, n = 1; i < from.size(); i += n, n = 1) {
            if (from[i] < 0) {
                continue;
            }
            while (i + n < from.size() && from[i + n] >= 0 && cells[i + n] == cells[i] + n) {
                ++n;
            }
            f(i, n, offset + cells[i]*size);
        }
    };
    for_each_range(edit.src, [&](size_t i, size_t n, size_t at) { ggml_backend_tensor_get(t, data.data() + i*size, at, n*size); });
    for_each_range(edit.dst, [&](size_t i, size_t n, size_t at) { ggml_backend_tensor_set(t, data.data() + i*size, at, n*size); });
}

static void move_data(llama_kv_cache & kv, uint32_t stream, const cache_edit & edit, const std::vector<llama_pos> & from) {
    for (const auto & layer : kv.pop_layers()) {
        ggml_tensor * k = layer.k_stream[stream];
        ggml_tensor * v = layer.v_stream[stream];

        move_pieces(k, 0, k->nb[1], edit, from);
        if (!v) {
            continue;
        }
        if (!kv.pop_v_trans()) {
            move_pieces(v, 0, v->nb[1], edit, from);
            continue;
        }
        const size_t size = ggml_type_size(v->type);
        for (int64_t j = 0; j < v->ne[0]; ++j) {
            move_pieces(v, j*kv.get_size()*size, size, edit, from);
        }
    }
}

static void edit_cache(llama_kv_cache & kv, llama_seq_id seq_id, llama_pos start, const std::vector<llama_pos> & from, const llama_token * tokens, const cache_edit & edit) {
    move_data(kv, kv.get_stream(seq_id), edit, from);

    kv.seq_rm(seq_id, start, -1);

    auto & cells = kv.pop_cells(kv.get_stream(seq_id));
    for (size_t i = 0; i < from.size(); ++i) {
        const llama_pos pos = start + (llama_pos) i;
        const uint32_t  cell = edit.dst[i];

        llama_kv_cell_ext ext;
        ext.tok = tokens[i];

        cells.pos_set(cell, from[i] < 0 ? pos : from[i]);
        cells.ext_set(cell, ext);
        cells.seq_add(cell, seq_id);
        if (from[i] >= 0 && from[i] != pos) {
            cells.pos_add(cell, pos - from[i]);
        }
    }
}

bool llama_kv_cache::pop_next_shift(uint32_t n_max) {
    const uint32_t size  = get_size();
    const uint32_t n_all = size*n_stream;

    const auto is_moved = [&](uint32_t i) {
        const auto & cells = v_cells[i/size];
        return !cells.is_empty(i % size) && cells.get_shift(i % size) != 0;
    };
    uint32_t first = pop_shift.first + pop_shift.n;
    while (first < n_all && !is_moved(first)) {
        ++first;
    }
    uint32_t end = first;
    while (end < n_all && end - first < n_max && is_moved(end)) {
        ++end;
    }
    pop_shift = { first, end - first };

    return pop_shift.n > 0 && hparams.rope_type != LLAMA_ROPE_TYPE_NONE;
}

// rotate K of the rows that have moved, return false on failure
static bool rotate(llama_context & ctx, const llama_pop_caches & kv) {
    ctx.memory_update(false);

    // llama.cpp resets the shifts only after it has rotated all rows
    return !kv.base->get_has_shift() && !(kv.swa && kv.swa->get_has_shift());
}

//
// C ABI
//

static std::string find_obstacle(llama_context & ctx, const llama_pop_caches & kv, llama_seq_id seq_id, bool shifts) {
    if (!kv.base) {
        return "the memory is not a KV cache";
    }
    if (seq_id < 0 || seq_id >= (llama_seq_id) kv.base->get_n_seq_max()) {
        return format("there is no sequence %d", seq_id);
    }
    if (ctx.get_model().hparams.n_pos_per_embd() > 1) {
        return "rows of this model have several positions each";
    }
    // llama.cpp's shift of a quantized K expects heads of one size, which MLA does not have
    const bool is_mla = ctx.get_model().hparams.n_lora_kv > 0;
    if (shifts && (!kv.base->pop_can_shift() || (is_mla && ggml_is_quantized(kv.base->type_k())))) {
        return "rows of this model cannot move";
    }
    return "";
}

int32_t llama_pop_move_rows(llama_context * ctx, llama_seq_id seq_id, llama_pos start, const llama_pos * from, const llama_token * tokens, int32_t n) {
    const auto kv = llama_pop_get_caches(llama_get_memory(ctx));

    const std::vector<llama_pos> rows(from, from + n);

    bool shifts = false;
    for (int32_t i = 0; i < n; ++i) {
        shifts = shifts || (from[i] >= 0 && from[i] != start + i);
    }

    cache_edit base, swa;

    auto obstacle = find_obstacle(*ctx, kv, seq_id, shifts);
    if (obstacle.empty()) {
        obstacle = plan_edit(kv.base->get_cells(seq_id), seq_id, start, rows, base);
    }
    if (obstacle.empty() && kv.swa) {
        obstacle = plan_edit(kv.swa->get_cells(seq_id), seq_id, start, rows, swa);
    }
    if (!obstacle.empty()) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, obstacle.c_str());
        return -1;
    }

    ctx->synchronize();
    if (!rotate(*ctx, kv)) {
        LLAMA_LOG_ERROR("%s: failed to rotate rows of earlier moves\n", __func__);
        return -1;
    }

    edit_cache(*kv.base, seq_id, start, rows, tokens, base);
    if (kv.swa) {
        edit_cache(*kv.swa, seq_id, start, rows, tokens, swa);
    }
    if (shifts && !rotate(*ctx, kv)) {
        LLAMA_LOG_ERROR("%s: failed to rotate the moved rows\n", __func__);
        return -2;
    }
    return 0;
}

int32_t llama_pop_set_overwrite(llama_context * ctx, bool overwrite) {
    const auto kv = llama_pop_get_caches(llama_get_memory(ctx));
    if (!kv.base) {
        LLAMA_LOG_ERROR("%s: the memory is not a KV cache\n", __func__);
        return -1;
    }
    ctx->pop().overwrite = kv.base->pop_overwrite = overwrite;
    if (kv.swa) {
        kv.swa->pop_overwrite = overwrite;
    }
    return 0;
}
