// prefill-only pruning: models that cannot be pruned, and the keys and tensors of the file and its sidecar, see llama-pop.h

#include "llama-pop.h"

#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

//
// architectures
//

// return false for architectures that read no prompt into a memory, or whose layers are not built in one loop
static bool is_decoder(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_BERT:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
        case LLM_ARCH_WAVTOKENIZER_DEC:
        case LLM_ARCH_CLIP:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return false;
        default:
            return !llm_arch_is_diffusion(arch);
    }
}

std::string llama_pop_find_obstacle(const llama_model & model, uint32_t boundary) {
    const auto & hparams = model.hparams;

    if (!is_decoder(model.arch)) {
        return format("architecture '%s' is an encoder, a diffusion model or a draft", llm_arch_name(model.arch));
    }
    if (model.arch == LLM_ARCH_CHAMELEON) {
        return "llama.cpp does not support rows without logits for architecture 'chameleon'";
    }
    if (boundary < 1 || boundary >= hparams.n_layer()) {
        return format("boundary %u is not between 1 and %u", boundary, hparams.n_layer() - 1);
    }
    if (boundary < hparams.n_deepstack_layers) {
        return format("boundary %u is too low: the first %u layers add image features", boundary, hparams.n_deepstack_layers);
    }
    const uint32_t shared = llama_pop_exact_layer(hparams);
    if (shared > 0 && boundary >= shared) {
        return format("boundary %u is too high: the layers from %u on store no K/V", boundary, shared);
    }
    return "";
}

uint32_t llama_pop_exact_layer(const llama_hparams & hparams) {
    const int32_t n_kv = hparams.n_layer_kv_from_start;

    return n_kv > 1 && n_kv < (int32_t) hparams.n_layer() ? n_kv : 0;
}

//
// keys
//

[[noreturn]] static void refuse(const std::string & why) {
    throw std::runtime_error("prefill-only pruning: " + why);
}

static bool has_pop_keys(const gguf_context * gguf) {
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        if (strncmp(gguf_get_key(gguf, i), "pop.", 4) == 0) {
            return true;
        }
    }
    return false;
}

static int64_t find_key(const gguf_context * gguf, const char * key, gguf_type type) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id >= 0 && gguf_get_kv_type(gguf, id) != type) {
        refuse(format("key %s has type %s, expected %s", key, gguf_type_name(gguf_get_kv_type(gguf, id)), gguf_type_name(type)));
    }
    return id;
}

static uint32_t get_u32(const gguf_context * gguf, const char * key, uint32_t fallback) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_UINT32);
    return id < 0 ? fallback : gguf_get_val_u32(gguf, id);
}

static std::string get_str(const gguf_context * gguf, const char * key, const char * fallback = nullptr) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_STRING);
    if (id < 0 && !fallback) {
        refuse(format("key %s is missing", key));
    }
    return id < 0 ? fallback : gguf_get_val_str(gguf, id);
}

static uint32_t parse_schedule(const std::string & schedule, uint32_t n_layer) {
    const size_t boundary = schedule.find('S');

    if (schedule.size() != n_layer || boundary == 0 || boundary == std::string::npos ||
            schedule != std::string(boundary, 'F') + std::string(n_layer - boundary, 'S')) {
        refuse(format("pop.schedule is '%s', expected one letter for each of the %u layers: F's, then S's, at least one of each",
                schedule.c_str(), n_layer));
    }

    return boundary;
}

//
// sidecar
//

static uint64_t get_u64(const gguf_context * gguf, const char * key) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_UINT64);
    return id < 0 ? 0 : gguf_get_val_u64(gguf, id);
}

std::string llama_pop_take_sidecar(std::vector<std::string> & paths, uint16_t n_split) {
    const size_t n_base = std::max<uint16_t>(n_split, 1);

    // llama.cpp reports missing parts itself
    if (paths.size() <= n_base) {
        return "";
    }
    if (paths.size() > n_base + 1) {
        refuse(format("there are %zu files for a model of %zu and one sidecar", paths.size(), n_base));
    }

    const std::string path = paths.back();
    paths.pop_back();
    return path;
}

// compare only the model's size: the caller compares hashes, and the schedule and tensors are checked when they are read
static void check_sidecar(const llama_model_loader & ml, const gguf_context * gguf, const char * path) {
    const std::string arch = get_str(gguf, "general.architecture");
    if (arch != "pop-sidecar") {
        refuse(format("%s is not a sidecar", path));
    }
    if (has_pop_keys(ml.metadata)) {
        refuse("the model already has POP keys, so it accepts no sidecar");
    }

    uint64_t n_bytes = 0;
    for (const auto & file : ml.files) {
        n_bytes += file->size();
    }

    const uint64_t n_expected = get_u64(gguf, "pop.sidecar.base_bytes");
    if (n_bytes != n_expected) {
        refuse(format("%s belongs to another model: one of %llu bytes, not %llu", path,
                (unsigned long long) n_expected, (unsigned long long) n_bytes));
    }

    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        const char * key = gguf_get_key(gguf, i);
        if (strncmp(key, "pop.", 4) != 0 && strcmp(key, "general.architecture") != 0) {
            refuse(format("%s has the key %s, which does not belong in a sidecar", path, key));
        }
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        const char * name = gguf_get_tensor_name(gguf, i);
        if (strstr(name, ".pop_") == nullptr) {
            refuse(format("%s has the tensor %s, which does not belong in a sidecar", path, name));
        }
    }
}

void llama_pop_load_sidecar(llama_model_loader & ml, const std::string & path) {
    if (path.empty()) {
        return;
    }

    ggml_context * ctx = nullptr;

    gguf_context_ptr gguf { gguf_init_from_file(path.c_str(), { /*.no_alloc = */ true, /*.ctx = */ &ctx }) };
    if (!gguf) {
        refuse(format("%s cannot be read as a sidecar", path.c_str()));
    }
    ggml_context_ptr ctx_ptr { ctx };

    check_sidecar(ml, gguf.get(), path.c_str());

    if (gguf_get_n_tensors(gguf.get()) > 0) {
        ml.files.emplace_back(new llama_file(path.c_str(), "rb", ml.use_direct_io));
        ml.contexts.push_back(std::move(ctx_ptr));

        const uint16_t idx = ml.files.size() - 1;
        for (ggml_tensor * cur = ggml_get_first_tensor(ctx); cur; cur = ggml_get_next_tensor(ctx, cur)) {
            ml.n_elements += ggml_nelements(cur);
            ml.n_bytes    += ggml_nbytes(cur);
            ml.weights_map.emplace(ggml_get_name(cur), llama_model_loader::llama_tensor_weight(ml.files.back().get(), idx, gguf.get(), cur));
        }
    }

    // merge the keys: all later code sees a model with POP keys
    gguf_remove_key(gguf.get(), "general.architecture");
    gguf_set_kv(ml.metadata, gguf.get());
}

//
// keys and tensors
//

void llama_pop_load_hparams(llama_model_base & model, llama_model_loader & ml) {
    const gguf_context * gguf = ml.metadata;

    const uint32_t exact = llama_pop_exact_layer(model.hparams);
    if (exact > 0) {
        LLAMA_LOG_INFO("%s: layers %u to %u store no K/V, so rows without logits skip them\n", __func__, exact, model.hparams.n_layer() - 1);
    }

    if (!gguf || !has_pop_keys(gguf)) {
        return;
    }

    const uint32_t version = get_u32(gguf, "pop.version", 0);
    if (version != 1) {
        refuse(format("pop.version is %u, this library reads version 1", version));
    }

    const std::string projection = get_str(gguf, "pop.projection", "own");
    if (projection != "own" && projection != "fitted" && projection != "fitted-wide") {
        refuse(format("pop.projection is '%s', expected 'own', 'fitted' or 'fitted-wide'", projection.c_str()));
    }

    auto & pop = model.hparams.pop;

    pop.wide        = projection == "fitted-wide";
    pop.fitted      = projection == "fitted" || pop.wide;
    pop.boundary    = parse_schedule(get_str(gguf, "pop.schedule"), model.hparams.n_layer());
    pop.sink_tokens = get_u32(gguf, "pop.sink_tokens", pop.sink_tokens);
    pop.tail_tokens = get_u32(gguf, "pop.tail_tokens", pop.tail_tokens);

    pop.fitted_images = get_u32(gguf, "pop.image_rows", 0) > 0;

    const auto obstacle = llama_pop_find_obstacle(model, pop.boundary);
    if (!obstacle.empty()) {
        refuse(obstacle);
    }

    LLAMA_LOG_INFO("%s: boundary = %u of %u layers, %s projections\n", __func__, pop.boundary, model.hparams.n_layer(), projection.c_str());
}

// check the values in the file: loaded weights may be repacked by a backend and cannot be read back
static void check_tensor(const llama_model_loader & ml, const llama_model_loader::llama_tensor_weight & weight) {
    const ggml_tensor * tensor = weight.tensor;

    const bool is_bias = ggml_n_dims(tensor) == 1;
    const bool is_float = tensor->type == GGML_TYPE_F32 || tensor->type == GGML_TYPE_F16 || tensor->type == GGML_TYPE_BF16;

    if (is_bias ? tensor->type != GGML_TYPE_F32 : !is_float && !ggml_is_quantized(tensor->type)) {
        refuse(format("tensor '%s' has type %s", tensor->name, ggml_type_name(tensor->type)));
    }

    std::vector<uint8_t> data(ggml_nbytes(tensor));
    const auto & file = ml.files.at(weight.idx);
    file->seek(weight.offs, SEEK_SET);
    file->read_raw(data.data(), data.size());

    if (!ggml_validate_row_data(tensor->type, data.data(), data.size())) {
        refuse(format("tensor '%s' has values that are not finite", tensor->name));
    }
}

// first: the first layer with fitted projections
static bool belongs(const llama_pop_hparams & pop, uint32_t il, const char * part, uint32_t first) {
    const bool is_projection = strncmp(part, "attn_", 5) == 0;

    // tensors of the second input belong to the layer at the boundary
    if (!is_projection || strstr(part, "_wide")) {
        return pop.wide && (is_projection ? il >= first : il == pop.boundary);
    }
    return il >= first;
}

// return the number of rows of a tensor, 0 if the file lacks it
static int64_t count_rows(const llama_model_loader & ml, const std::string & name) {
    const ggml_tensor * meta = ml.get_tensor_meta(name.c_str());
    return meta ? meta->ne[1] : 0;
}

// load the tensors of the second input and return its length
static int64_t load_wide_input(llama_model_base & model, llama_model_loader & ml, int il) {
    auto & pop = model.layers[il].pop;

    const int64_t n_embd    = model.hparams.n_embd;
    const int64_t n_prev    = count_rows(ml, model.tn(LLM_TENSOR_POP_PREV,     "weight", il));
    const int64_t n_neurons = count_rows(ml, model.tn(LLM_TENSOR_POP_FFN_GATE, "weight", il));

    pop.prev = model.create_tensor(model.tn(LLM_TENSOR_POP_PREV, "weight", il), { n_embd, n_prev }, 0);

    if (n_neurons > 0) {
        if (!model.layers[il].ffn_norm) {
            refuse(format("layer %d has no FFN, but the file has neurons of it", il));
        }
        pop.gate = model.create_tensor(model.tn(LLM_TENSOR_POP_FFN_GATE, "weight", il), { n_embd, n_neurons }, 0);
        pop.up   = model.create_tensor(model.tn(LLM_TENSOR_POP_FFN_UP,   "weight", il), { n_embd, n_neurons }, 0);
    }

    return n_prev + n_neurons;
}

void llama_pop_load_tensors(llama_model_base & model, llama_model_loader & ml) {
    const auto & hparams = model.hparams;

    if (hparams.pop.fitted && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        refuse("fitted projections cannot be split among devices by tensor, split by layer");
    }

    // the layer at the boundary has no fitted projections: its own are exact
    const uint32_t first = hparams.pop.fitted ? hparams.pop.boundary + 1 : hparams.n_layer();

    std::vector<const llama_model_loader::llama_tensor_weight *> weights;
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.find(".pop_") == std::string::npos) {
            continue;
        }
        uint32_t il = 0;
        char part[GGML_MAX_NAME];
        if (sscanf(name.c_str(), "blk.%u.pop_%63s", &il, part) != 2 || !belongs(hparams.pop, il, part, first)) {
            refuse(format("tensor '%s' does not belong to the schedule and projection of the file", name.c_str()));
        }
        weights.push_back(&weight);
    }

    const int64_t n_wide = hparams.pop.wide ? load_wide_input(model, ml, hparams.pop.boundary) : 0;

    for (uint32_t il = first; il < hparams.n_layer(); ++il) {
        auto & pop = model.layers[il].pop;

        const int64_t n_embd = hparams.n_embd;
        const int64_t n_k    = hparams.n_embd_k_gqa(il);
        const int64_t n_v    = hparams.n_embd_v_gqa(il);

        pop.wk   = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_K, "weight", il), { n_embd, n_k }, 0);
        pop.wk_b = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_K, "bias",   il), { n_k },         0);
        pop.wv   = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_V, "weight", il), { n_embd, n_v }, 0);
        pop.wv_b = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_V, "bias",   il), { n_v },         0);

        if (hparams.pop.wide) {
            pop.wk_wide = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_K_WIDE, "weight", il), { n_wide, n_k }, 0);
            pop.wv_wide = model.create_tensor(model.tn(LLM_TENSOR_POP_ATTN_V_WIDE, "weight", il), { n_wide, n_v }, 0);
        }
    }

    // with no_alloc, data must not be read
    if (!ml.no_alloc) {
        for (const auto * weight : weights) {
            check_tensor(ml, *weight);
        }
    }
}
