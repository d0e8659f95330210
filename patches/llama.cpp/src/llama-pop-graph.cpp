// prefill-only pruning: the graph, see llama-pop.h

#include "llama-pop.h"
#include "llama-pop-graph.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// attention inputs
//

// the inputs of the layers of one kind (with or without a sliding window) and their KV cache
struct llama_pop_attn {
    const llama_kv_cache_context * mctx;

    ggml_tensor *& k_idxs;
    ggml_tensor *& v_idxs;
    ggml_tensor *& mask;
    ggml_tensor *& mask_cnv;
    ggml_tensor *  k_rot;
    ggml_tensor *  v_rot;
};

static std::vector<llama_pop_attn> get_attn(llm_graph_input_attn_kv & inp) {
    return {
        { inp.mctx, inp.self_k_idxs, inp.self_v_idxs, inp.self_kq_mask, inp.self_kq_mask_cnv, inp.self_k_rot, inp.self_v_rot },
    };
}

static std::vector<llama_pop_attn> get_attn(llm_graph_input_attn_kv_iswa & inp) {
    return {
        { inp.mctx->get_base(), inp.self_k_idxs, inp.self_v_idxs, inp.self_kq_mask, inp.self_kq_mask_cnv, inp.self_k_rot, inp.self_v_rot },
        { inp.mctx->get_swa(), inp.self_k_idxs_swa, inp.self_v_idxs_swa, inp.self_kq_mask_swa, inp.self_kq_mask_swa_cnv, inp.self_k_rot_swa, inp.self_v_rot_swa },
    };
}

static llama_pop_attn get_attn_of_layer(llm_graph_input_attn_kv & inp, const llama_hparams &, int) {
    return get_attn(inp)[0];
}

static llama_pop_attn get_attn_of_layer(llm_graph_input_attn_kv_iswa & inp, const llama_hparams & hparams, int il) {
    return get_attn(inp)[hparams.is_swa(il) ? 1 : 0];
}

// inputs are [.., n_tokens] with the rows of the ubatch outermost
static void gather_rows(ggml_tensor * dst, const ggml_tensor * src, const std::vector<int32_t> & rows, uint32_t n_tokens) {
    if (!is_used(dst)) {
        return;
    }

    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer) && ggml_backend_buffer_is_host(src->buffer));

    const size_t size = ggml_nbytes(src)/n_tokens;
    for (size_t i = 0; i < rows.size(); ++i) {
        memcpy((char *) dst->data + i*size, (const char *) src->data + rows[i]*size, size);
    }
}

// the inputs of the layers past the boundary: those of the whole ubatch, reduced to the full rows
template <typename T>
class llm_graph_input_pop : public llm_graph_input_i {
public:
    llm_graph_input_pop(llama_pop_plan plan, T * whole, ggml_tensor * out_ids, uint32_t n_pos_per_embd) :
        plan(std::move(plan)), whole(whole), reduced(*whole), out_ids(out_ids), pos(n_pos_per_embd) {}

    // note: the inputs of the whole ubatch were added, and so are set, before these
    void set_input(const llama_ubatch * ubatch) override {
        const auto & rows = plan.rows;

        for (int64_t i = 0; i < ids->ne[1]; ++i) {
            ggml_backend_tensor_set(ids, rows.data(), i*ids->nb[1], rows.size()*sizeof(int32_t));
        }

        set_out_ids(*ubatch);

        std::vector<llama_pos>      row_pos;
        std::vector<int32_t>        row_n_seq_id;
        std::vector<llama_seq_id *> row_seq_id;

        const uint32_t n_pos = std::max<uint32_t>(1, ubatch->n_pos);
        for (uint32_t p = 0; p < n_pos; ++p) {
            for (const int32_t row : rows) {
                row_pos.push_back(ubatch->pos[p*ubatch->n_tokens + row]);
            }
        }
        for (const int32_t row : rows) {
            row_n_seq_id.push_back(ubatch->n_seq_id[row]);
            row_seq_id  .push_back(ubatch->seq_id  [row]);
        }

        llama_ubatch sub = *ubatch;

        sub.n_tokens = rows.size();
        sub.pos      = row_pos.data();
        sub.n_seq_id = row_n_seq_id.data();
        sub.seq_id   = row_seq_id.data();

        pos.set_input(&sub);

        reduced.mctx = whole->mctx; // that of this batch: the one before is gone

        const auto src = get_attn(*whole);
        const auto dst = get_attn(reduced);

        for (size_t i = 0; i < src.size(); ++i) {
            gather_rows(dst[i].k_idxs, src[i].k_idxs, rows, ubatch->n_tokens);
            gather_rows(dst[i].v_idxs, src[i].v_idxs, rows, ubatch->n_tokens);

            if (is_used(src[i].mask)) {
                gather_rows(dst[i].mask, src[i].mask, rows, ubatch->n_tokens);
            } else if (is_used(dst[i].mask)) {
                src[i].mctx->set_input_kq_mask(dst[i].mask, &sub, whole->cparams.causal_attn);
            }
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        auto plan_new = llama_pop_make_plan(params.hparams, params.cparams, params.ubatch);

        bool res = plan_new.il == plan.il && plan_new.rows.size() == plan.rows.size();

        plan = std::move(plan_new);

        reduced.mctx = whole->mctx; // that of this batch: the one before is gone

        const auto src = get_attn(*whole);
        const auto dst = get_attn(reduced);

        for (size_t i = 0; i < src.size(); ++i) {
            res &= dst[i].mask->ne[0] == src[i].mctx->get_n_kv();
        }

        return res;
    }

    llama_pop_plan plan;

    T * whole; // owned by the graph result
    T   reduced;

    ggml_tensor * ids = nullptr; // I32 [n_full, n_slices], each slice the same
    ggml_tensor * out_ids;       // I32 [n_outputs], the input of the whole ubatch: it comes to index the full rows

    llm_graph_input_pos pos;

private:
    void set_out_ids(const llama_ubatch & ubatch) {
        if (!is_used(out_ids)) {
            return;
        }

        std::vector<int32_t> idxs;
        for (size_t i = 0; i < plan.rows.size(); ++i) {
            if (ubatch.output[plan.rows[i]]) {
                idxs.push_back(i);
            }
        }

        ggml_backend_tensor_set(out_ids, idxs.data(), 0, idxs.size()*sizeof(int32_t));
    }
};

//
// graph
//

uint32_t llama_pop_n_nodes(const llama_model & model) {
    return llama_pop_supports(model.arch) ? 40*model.hparams.n_layer() : llama_pop_exact_layer(model.arch, model.hparams) > 0 ? 32 : 0;
}

// cur: Q or K [n_embd_head, n_head, n_tokens]
static ggml_tensor * build_rope(const llm_graph_context & g, const llama_model & model, ggml_tensor * cur, ggml_tensor * inp_pos, int il) {
    const bool per_layer = llama_pop_rope_per_layer(g.arch);

    const float base  = per_layer ? model.get_rope_freq_base (g.cparams, il) : g.freq_base;
    const float scale = per_layer ? model.get_rope_freq_scale(g.cparams, il) : g.freq_scale;

    if (g.hparams.n_pos_per_embd() > 1) {
        int sections[4];
        std::copy(std::begin(g.hparams.rope_sections), std::begin(g.hparams.rope_sections) + 4, sections);

        return ggml_rope_multi(g.ctx0, cur, inp_pos, nullptr,
                g.hparams.n_rot(il), sections, g.rope_type, g.n_ctx_orig, base, scale,
                g.ext_factor, g.attn_factor, g.beta_fast, g.beta_slow);
    }

    return ggml_rope_ext(g.ctx0, cur, inp_pos, model.get_rope_factors(g.cparams, il),
            g.hparams.n_rot(il), g.rope_type, g.n_ctx_orig, base, scale,
            g.ext_factor, g.attn_factor, g.beta_fast, g.beta_slow);
}

// wide: null, or what llama_pop_build_wide() gives
static llm_graph_qkv build_fitted_kv(const llm_graph_context & g, const llama_pop_layer & layer, ggml_tensor * cur, ggml_tensor * wide, int il) {
    ggml_tensor * k = g.build_lora_mm(layer.wk, cur);
    ggml_tensor * v = g.build_lora_mm(layer.wv, cur);

    if (wide) {
        k = ggml_add(g.ctx0, k, g.build_lora_mm(layer.wk_wide, wide));
        v = ggml_add(g.ctx0, v, g.build_lora_mm(layer.wv_wide, wide));
    }

    k = ggml_add(g.ctx0, k, layer.wk_b);
    v = ggml_add(g.ctx0, v, layer.wv_b);

    k = ggml_reshape_3d(g.ctx0, k, g.hparams.n_embd_head_k(il), g.hparams.n_head_kv(il), g.n_tokens);
    v = ggml_reshape_3d(g.ctx0, v, g.hparams.n_embd_head_v(il), g.hparams.n_head_kv(il), g.n_tokens);

    return { nullptr, k, v };
}

// note: of the own projections Q stays outside the graph, unless its weights are fused with those of K and V
static llm_graph_qkv build_own_kv(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * cur, int il) {
    const int64_t n_k = g.hparams.n_embd_head_k(il);
    const int64_t n_v = g.hparams.n_embd_head_v(il);

    return g.build_qkv(layer, cur, n_k, g.hparams.n_head(il), n_k, g.hparams.n_head_kv(il), n_v, g.hparams.n_head_kv(il), il);
}

static void store_kv(const llm_graph_context & g, const llama_pop_attn & attn, ggml_tensor * k, ggml_tensor * v, int il) {
    if (attn.k_rot) {
        k = llama_mul_mat_hadamard(g.ctx0, k, attn.k_rot);
    }
    if (attn.v_rot) {
        v = llama_mul_mat_hadamard(g.ctx0, v, attn.v_rot);
    }

    ggml_build_forward_expand(g.gf, attn.mctx->cpy_k(g.ctx0, k, attn.k_idxs, il));
    ggml_build_forward_expand(g.gf, attn.mctx->cpy_v(g.ctx0, v, attn.v_idxs, il));
}

// what the heads of a layer's attention give, [n_embd_head_v*n_head, n_tokens]; stores its K/V
template <typename T>
static ggml_tensor * build_heads(const llm_graph_context & g, const llama_model & model, T & inp_attn, ggml_tensor * inp_pos, llm_graph_qkv qkv, int il) {
    const auto & layer = model.layers[il];

    if (layer.attn_q_norm) {
        qkv.q = g.build_norm(qkv.q, layer.attn_q_norm, nullptr, LLM_NORM_RMS, il);
    }
    qkv.q = build_rope(g, model, qkv.q, inp_pos, il);

    // before the soft cap, which comes before kq_scale
    const float given = g.hparams.f_attention_scale;
    qkv.q = ggml_scale(g.ctx0, qkv.q, given == 0.0f ? 1.0f/sqrtf(float(g.hparams.n_embd_head_k(il))) : given);

    ggml_tensor * heads = g.build_attn(&inp_attn, nullptr, nullptr, nullptr, qkv.q, qkv.k, qkv.v, nullptr, nullptr, nullptr, 1.0f, il);
    g.cb(heads, "pop_heads", -1);
    return heads;
}

// stores the K/V of all rows for the skipped layers, projected from their state at the boundary
// note: the layers themselves overwrite those of the full rows later in the graph
template <typename T>
static void build_kv(const llm_graph_context & g, const llama_model & model, int boundary, ggml_tensor * inpL, ggml_tensor * inp_pos, T & inp_attn) {
    // the normalisation is the same for all layers, only the gain differs
    ggml_tensor * normed = g.build_norm(inpL, nullptr, nullptr, LLM_NORM_RMS, -1);
    g.cb(normed, "pop_norm", -1);

    // what was fitted on text alone is worse for images than the layers' own projections
    const bool takes_fitted = !g.ubatch.embd || g.hparams.pop.fitted_images;

    ggml_tensor * wide = g.hparams.pop.wide && takes_fitted ? llama_pop_build_wide(g, model.layers[boundary], normed) : nullptr;

    for (int il = boundary; il < g.n_layer; ++il) {
        const auto & layer = model.layers[il];

        ggml_tensor * cur = ggml_mul(g.ctx0, normed, layer.attn_norm);
        if (layer.attn_norm_b) {
            cur = ggml_add(g.ctx0, cur, layer.attn_norm_b);
        }

        auto [q, k, v] = layer.pop.wk && takes_fitted ? build_fitted_kv(g, layer.pop, cur, wide, il) : build_own_kv(g, layer, cur, il);

        if (layer.attn_k_norm) {
            k = g.build_norm(k, layer.attn_k_norm, nullptr, LLM_NORM_RMS, il);
        }

        k = build_rope(g, model, k, inp_pos, il);

        g.cb(k, "pop_k", il);
        g.cb(v, "pop_v", il);

        if (il == boundary && wide && g.hparams.pop.attention) {
            wide = ggml_concat(g.ctx0, wide, build_heads(g, model, inp_attn, inp_pos, { q, k, v }, il), 0);
            continue;
        }

        store_kv(g, get_attn_of_layer(inp_attn, g.hparams, il), k, v, il);
    }
}

static int64_t count_slices(const std::vector<ggml_tensor **> & states) {
    int64_t res = 1;
    for (const auto * state : states) {
        res = std::max(res, (*state)->ne[2]);
    }
    return res;
}

// reduces the states and the inputs to the full rows
template <typename T>
static void build_reduction(llm_graph_context & g, llama_pop_plan plan, const std::vector<ggml_tensor **> & states, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, T *& inp_attn) {
    const int64_t n_full = plan.rows.size();
    const int64_t n_pos  = g.hparams.n_pos_per_embd();

    auto inp = std::make_unique<llm_graph_input_pop<T>>(std::move(plan), inp_attn, inp_out_ids, n_pos);

    inp->ids     = new_input(g, GGML_TYPE_I32, n_full,       count_slices(states));
    inp->pos.pos = new_input(g, GGML_TYPE_I32, n_full*n_pos, 1);

    for (auto & attn : get_attn(inp->reduced)) {
        attn.k_idxs   = new_input(g, attn.k_idxs->type, attn.k_idxs->ne[0]/g.n_tokens*n_full, 1);
        attn.v_idxs   = new_input(g, attn.v_idxs->type, attn.v_idxs->ne[0]/g.n_tokens*n_full, 1);
        attn.mask     = new_input(g, attn.mask->type,   attn.mask->ne[0], n_full/attn.mask->ne[3], attn.mask->ne[3]);
        attn.mask_cnv = attn.mask;
    }

    for (auto * state : states) {
        *state = pick_rows(g, *state, inp->ids);
        g.cb(*state, "pop_full", -1);
    }

    inp_pos  = inp->pos.pos;
    inp_attn = &inp->reduced;

    g.n_tokens = n_full;

    g.res->add_input(std::move(inp));
}

// the states that a deep pass begins with: an architecture may have scaled its input as if it were of tokens
class llm_graph_input_pop_states : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        ggml_backend_tensor_set(states, ubatch->embd, 0, ggml_nbytes(states));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.ubatch.n_tokens == states->ne[1];
    }

    ggml_tensor * states = nullptr; // F32 [n_embd, n_tokens]
};

static ggml_tensor * build_kept_states(llm_graph_context & g) {
    auto inp = std::make_unique<llm_graph_input_pop_states>();

    inp->states = new_input(g, GGML_TYPE_F32, g.n_embd, g.n_tokens);

    ggml_tensor * states = inp->states;
    g.res->add_input(std::move(inp));
    return states;
}

template <typename T>
static bool enter_layer(llm_graph_context & g, const llama_model & model, int & il, ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, T *& inp_attn) {
    const auto & pop = g.cparams.pop;

    if (pop.deepening) {
        if (il == 0) {
            il   = pop.boundary;
            inpL = build_kept_states(g);
        }
        return false;
    }

    if (il == 0 || il != (int) pop.boundary) {
        return false;
    }

    if (pop.keep) {
        build_output(g, ggml_cont(g.ctx0, inpL), LLAMA_POP_STATES);
    }

    auto plan = llama_pop_make_plan(g.hparams, g.cparams, g.ubatch);
    if (plan.il < 0) {
        return false;
    }

    build_kv(g, model, il, inpL, inp_pos, *inp_attn);

    if (plan.rows.empty()) {
        inpL = ggml_get_rows(g.ctx0, inpL, inp_out_ids);
        return true;
    }

    build_reduction(g, std::move(plan), { &inpL }, inp_pos, inp_out_ids, inp_attn);
    return false;
}

bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int & il, ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv *& inp_attn) {
    return enter_layer(g, model, il, inpL, inp_pos, inp_out_ids, inp_attn);
}

bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int & il, ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn) {
    return enter_layer(g, model, il, inpL, inp_pos, inp_out_ids, inp_attn);
}

bool llama_pop_enter_layer(llm_graph_context &, const llama_model &, int &, ggml_tensor *&, ggml_tensor *&, ggml_tensor *, llm_graph_input_attn_no_cache *&) {
    return false; // embeddings: no KV cache to fill
}

bool llama_pop_leave(llm_graph_context & g, int il, ggml_tensor *& q, ggml_tensor *& k, ggml_tensor *& v, std::initializer_list<ggml_tensor **> states, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn) {
    if (il + 1 != (int) g.cparams.pop.exact) {
        return false;
    }

    auto plan = llama_pop_make_plan(g.hparams, g.cparams, g.ubatch);
    if (plan.il < 0) {
        return false;
    }

    store_kv(g, get_attn_of_layer(*inp_attn, g.hparams, il), k, v, il);
    k = nullptr;
    v = nullptr;

    std::vector<ggml_tensor **> present;
    for (auto * state : states) {
        if (*state) {
            present.push_back(state);
        }
    }

    if (plan.rows.empty()) {
        ggml_tensor * none = new_input(g, GGML_TYPE_I32, 0, count_slices(present));
        for (auto * state : present) {
            *state = pick_rows(g, *state, none);
        }
        g.n_tokens = 0;
        return true;
    }

    const int64_t n_head_dim = q->ne[0];
    const int64_t n_head     = q->ne[1];

    q = ggml_reshape_2d(g.ctx0, q, n_head_dim*n_head, g.n_tokens);
    present.push_back(&q);

    build_reduction(g, std::move(plan), present, inp_pos, inp_out_ids, inp_attn);

    q = ggml_reshape_3d(g.ctx0, q, n_head_dim, n_head, g.n_tokens);
    return false;
}
