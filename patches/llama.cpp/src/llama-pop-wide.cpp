// prefill-only pruning: the wider input of fitted projections, see llama-pop.h

#include "llama-pop.h"
#include "llama-pop-graph.h"

#include "llama-impl.h"
#include "llama-model.h"

// neurons have unit variance where they were fitted; rare ones far beyond spoil whole texts
static const float MOST_NEURON = 5.0f;

// of each row the one before it in its first sequence, or the row itself where the ubatch has none. positions never
// decrease within a sequence, so that this is the row before in the ubatch's order (images: the patch before)
static std::vector<int32_t> find_previous(const llama_ubatch & ubatch) {
    std::vector<int32_t> last(LLAMA_MAX_SEQ, -1);
    std::vector<int32_t> res;

    for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
        const int32_t found = last[ubatch.seq_id[i][0]];
        res.push_back(found < 0 ? i : found);

        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            last[ubatch.seq_id[i][s]] = i;
        }
    }
    return res;
}

class llm_graph_input_pop_previous : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        if (is_used(rows)) {
            ggml_backend_tensor_set(rows, find_previous(*ubatch).data(), 0, ggml_nbytes(rows));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.ubatch.n_tokens == rows->ne[0];
    }

    ggml_tensor * rows = nullptr; // I32 [n_tokens]
};

ggml_tensor * llama_pop_build_wide(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * normed) {
    auto inp = std::make_unique<llm_graph_input_pop_previous>();

    inp->rows = new_input(g, GGML_TYPE_I32, g.n_tokens, 1);

    ggml_tensor * previous = pick_rows(g, g.build_lora_mm(layer.pop.prev, normed), inp->rows);
    g.cb(previous, "pop_previous", -1);

    g.res->add_input(std::move(inp));

    if (!layer.pop.gate) {
        return previous;
    }

    ggml_tensor * cur  = ggml_mul(g.ctx0, normed, layer.ffn_norm);
    ggml_tensor * gate = g.build_lora_mm(layer.pop.gate, cur);
    ggml_tensor * up   = g.build_lora_mm(layer.pop.up,   cur);

    ggml_tensor * neurons = llama_pop_has_gelu(g.arch) ? ggml_geglu_split(g.ctx0, gate, up) : ggml_swiglu_split(g.ctx0, gate, up);
    neurons = ggml_clamp(g.ctx0, neurons, -MOST_NEURON, MOST_NEURON);
    g.cb(neurons, "pop_neurons", -1);

    return ggml_concat(g.ctx0, previous, neurons, 0);
}
