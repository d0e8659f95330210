// replacements for functions of other files of common/ and of libllama, so that the chat code links without them. there is never a model

#include "common.h"
#include "log.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

[[noreturn]] static void throw_no_model() {
    throw std::logic_error("this needs a model");
}

extern "C" {

// a failed assertion throws instead of ending the process
void ggml_abort(const char *, int, const char * format, ...) {
    char message[256];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    throw std::runtime_error(message);
}

int32_t llama_chat_apply_template(const char *, const llama_chat_message *, size_t, bool, char *, int32_t) { throw_no_model(); }

const char *        llama_model_chat_template(const llama_model *, const char *) { throw_no_model(); }
const llama_vocab * llama_model_get_vocab    (const llama_model *)               { throw_no_model(); }

llama_token llama_vocab_bos        (const llama_vocab *) { throw_no_model(); }
llama_token llama_vocab_eos        (const llama_vocab *) { throw_no_model(); }
bool        llama_vocab_get_add_bos(const llama_vocab *) { throw_no_model(); }
bool        llama_vocab_get_add_eos(const llama_vocab *) { throw_no_model(); }

}

std::string              common_token_to_piece(const llama_vocab *, llama_token, bool)              { throw_no_model(); }
std::vector<llama_token> common_tokenize      (const llama_vocab *, const std::string &, bool, bool) { throw_no_model(); }

int          common_log_get_verbosity_thold() { return -1; }
common_log * common_log_main()                { return nullptr; }
void         common_log_add(common_log *, ggml_log_level, const char *, ...) {}

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string out;
    for (const auto & value : values) {
        if (&value != &values.front()) {
            out += separator;
        }
        out += value;
    }
    return out;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> out;
    for (size_t at = 0;;) {
        const size_t end = str.find(delimiter, at);
        out.push_back(str.substr(at, end - at)); // npos: the rest
        if (end == std::string::npos) {
            return out;
        }
        at = end + delimiter.size();
    }
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string out;
    while (n-- > 0) {
        out += str;
    }
    return out;
}

void string_replace_all(std::string & s, const std::string & search, const std::string & replace) {
    std::string out;
    size_t at = 0;
    for (size_t end; !search.empty() && (end = s.find(search, at)) != std::string::npos; at = end + search.size()) {
        out += s.substr(at, end - at) + replace;
    }
    s = out + s.substr(at);
}
