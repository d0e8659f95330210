// prefill-only pruning: memory contexts for rows that already have cells, see llama-pop-cells.h

#include "llama-pop-cells.h"

#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"

#include <algorithm>

llama_pop_caches llama_pop_get_caches(llama_memory_i * memory) {
    if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return { kv->get_base(), kv->get_swa() };
    }
    return { dynamic_cast<llama_kv_cache *>(memory), nullptr };
}

const llama_kv_cache_context * llama_pop_find_cache(const llama_memory_context_i * mctx, bool is_swa) {
    if (const auto * both = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        mctx = both->get_attn();
    }
    if (const auto * both = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        mctx = both->get_attn();
    }
    if (const auto * both = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        mctx = is_swa ? both->get_swa() : both->get_base();
    }
    return dynamic_cast<const llama_kv_cache_context *>(mctx);
}

int64_t llama_pop_find_cell(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos pos) {
    const auto & all = cells.seq_pos_get(seq_id);

    const auto it = all.lower_bound({ pos, 0 });
    return it != all.end() && it->first == pos ? (int64_t) it->second : -1;
}

llama_kv_cache::slot_info llama_pop_find_slot(const llama_kv_cache & kv, llama_seq_id seq_id, const llama_pos * pos, int32_t n) {
    const auto & cells = kv.get_cells(seq_id);

    const uint32_t stream = kv.get_stream(seq_id);

    llama_kv_cache::slot_info res;
    res.s0 = res.s1 = stream;
    res.resize(1);
    res.strm[0] = stream;

    for (int32_t i = 0; i < n; ++i) {
        const int64_t cell = llama_pop_find_cell(cells, seq_id, pos[i]);
        if (cell < 0) {
            return {};
        }
        res.idxs[0].push_back(cell);
    }
    return res;
}

uint32_t llama_pop_count_cells(const llama_kv_cells & cells, uint32_t cell) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        const bool is_visible = !cells.is_empty(i) && cells.pos_get(i) <= cells.pos_get(cell);
        if (is_visible && (cells.seq_get_all(i) & cells.seq_get_all(cell)).any()) {
            n = i + 1;
        }
    }
    return std::min<uint32_t>(cells.size(), GGML_PAD(n, 256));
}

void llama_pop_forget_snapshots(const llama_kv_cells & cells, const llama_kv_cache::slot_info & slots) {
    for (const uint32_t cell : slots.idxs[0]) {
        cells.pop_has_snapshot[cell] = false;
    }
}

// note: a ubatch's rows are sorted by stream, with equally many of each
static llama_kv_cache::slot_info pick_slots(const llama_kv_cache_context & whole, const std::vector<int32_t> & rows) {
    const auto & slots = whole.pop_slots();

    auto res = slots;
    for (auto & idxs : res.idxs) {
        idxs.clear();
    }
    for (const int32_t row : rows) {
        const size_t s = row/slots.size();
        res.idxs[s].push_back(slots.idxs[s][row % slots.size()]);
    }
    return res;
}

llama_pop_places llama_pop_pick_places(const llama_memory_context_i & whole, const std::vector<int32_t> & rows) {
    llama_pop_places res;

    if (const auto * both = dynamic_cast<const llama_kv_cache_iswa_context *>(&whole)) {
        res.base      = pick_slots(*both->get_base(), rows);
        res.swa       = pick_slots(*both->get_swa(),  rows);
        res.n_kv_base = both->get_base()->get_n_kv();
        res.n_kv_swa  = both->get_swa()->get_n_kv();
    } else {
        const auto & base = dynamic_cast<const llama_kv_cache_context &>(whole);

        res.base      = pick_slots(base, rows);
        res.n_kv_base = base.get_n_kv();
    }
    return res;
}

llama_memory_context_ptr llama_pop_use_places(llama_memory_i * memory, llama_pop_places places, const llama_ubatch & ubatch) {
    const auto kv = llama_pop_get_caches(memory);

    llama_kv_cache::slot_info_vec_t base = { std::move(places.base) };

    if (!kv.swa) {
        return std::make_unique<llama_kv_cache_context>(kv.base, std::move(base), std::vector<llama_ubatch>{ ubatch });
    }

    llama_kv_cache::slot_info_vec_t swa = { std::move(places.swa) };

    return std::make_unique<llama_kv_cache_iswa_context>(static_cast<llama_kv_cache_iswa *>(memory), std::move(base), std::move(swa), std::vector<llama_ubatch>{ ubatch });
}

llama_pop_in_place::llama_pop_in_place(llama_memory_i * memory, const llama_pop_places & places) : kv(llama_pop_get_caches(memory)) {
    kv.base->pop_n_kv = places.n_kv_base;
    if (kv.swa) {
        kv.swa->pop_n_kv = places.n_kv_swa;
    }
}

llama_pop_in_place::~llama_pop_in_place() {
    kv.base->pop_n_kv = 0;
    if (kv.swa) {
        kv.swa->pop_n_kv = 0;
    }
}

llama_ubatch llama_pop_pick_rows(const llama_ubatch & whole, const std::vector<int32_t> & rows, int64_t n_embd_inp) {
    auto data = std::make_shared<llama_ubatch::data_t>();

    for (uint32_t p = 0; p < std::max<uint32_t>(1, whole.n_pos); ++p) {
        for (const int32_t row : rows) {
            data->pos.push_back(whole.pos[p*whole.n_tokens + row]);
        }
    }
    for (const int32_t row : rows) {
        if (whole.token) {
            data->token.push_back(whole.token[row]);
        }
        if (whole.embd) {
            data->embd.insert(data->embd.end(), whole.embd + row*n_embd_inp, whole.embd + (row + 1)*n_embd_inp);
        }
        data->n_seq_id.push_back(whole.n_seq_id[row]);
        data->seq_id  .push_back(whole.seq_id  [row]); // owned by the whole ubatch, which outlives this one
        data->output  .push_back(whole.output  [row]);
    }

    llama_ubatch res = whole;

    res.n_tokens     = rows.size();
    res.n_seqs       = whole.equal_seqs() ? whole.n_seqs : res.n_tokens;
    res.n_seq_tokens = res.n_tokens/res.n_seqs;

    res.token    = whole.token ? data->token.data() : nullptr;
    res.embd     = whole.embd  ? data->embd .data() : nullptr;
    res.pos      = data->pos     .data();
    res.n_seq_id = data->n_seq_id.data();
    res.seq_id   = data->seq_id  .data();
    res.output   = data->output  .data();
    res.data     = std::move(data);

    return res;
}
