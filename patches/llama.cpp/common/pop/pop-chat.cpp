// llama.cpp's chat formats, for the process in which pop_local renders templates. requests and replies are JSON:
//
//   pop_chat_render {template, bos, eos, messages, tools, tool_choice, parallel}
//                -> {prompt, start, grammar, triggers, shown, stops, takes_tools, format}
//   pop_chat_parse  {key, format, text, partial}
//                -> {content, reasoning, calls}
//
// an answer is parsed many times while it grows. only the first request needs its format, which is stored under the key
//
// messages, tools and tool_choice are OpenAI's. grammar is GBNF. it applies from the first sampled token on, or from a trigger
// on if there are any. shown: special tokens that are part of the format. both functions return {error} if an exception occurs.
// the caller frees the returned strings with pop_chat_free

#include "chat.h"
#include "json.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#ifdef _WIN32
#    define POP_CHAT_API extern "C" __declspec(dllexport)
#else
#    define POP_CHAT_API extern "C" __attribute__((visibility("default")))
#endif

using json = common_json;

namespace {

const char * TRIGGERS[] = { "token", "word", "pattern", "pattern_full" };

std::string text_of(const json & object, const char * name) {
    return object.contains(name) && object.at(name).is_string() ? object.at(name).get<std::string>() : std::string();
}

bool flag_of(const json & object, const char * name) {
    return object.contains(name) && object.at(name).is_boolean() && object.at(name).get<bool>();
}

common_chat_templates_inputs inputs_of(const json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages            = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tools               = common_chat_tools_parse_oaicompat(request.at("tools"));
    inputs.tool_choice         = common_chat_tool_choice_parse_oaicompat(text_of(request, "tool_choice"));
    inputs.parallel_tool_calls = flag_of(request, "parallel");
    inputs.reasoning_format    = COMMON_REASONING_FORMAT_AUTO;
    return inputs;
}

json render(const json & request) {
    const std::string source = text_of(request, "template");
    const auto inputs = inputs_of(request);

    const auto chat   = common_chat_templates_init(nullptr, source, text_of(request, "bos"), text_of(request, "eos"));
    const auto params = common_chat_templates_apply(chat.get(), inputs);

    // render the format without the EOS token, which is never shown
    const auto open      = common_chat_templates_init(nullptr, source, text_of(request, "bos"), "");
    const auto endless   = common_chat_templates_apply(open.get(), inputs);

    json triggers = json::array();
    for (const auto & trigger : endless.grammar_triggers) {
        triggers.push_back(json{ { "type", TRIGGERS[trigger.type] }, { "value", trigger.value } });
    }

    return json{
        { "prompt",      params.prompt },
        { "start",       endless.generation_prompt },
        { "grammar",     endless.grammar },
        { "triggers",    triggers },
        { "shown",       endless.preserved_tokens },
        { "stops",       endless.additional_stops },
        { "takes_tools", common_chat_templates_get_caps(chat.get())["supports_tools"] },
        { "format", json{
            { "kind",   (int) endless.format },
            { "start",  endless.generation_prompt },
            { "parser", endless.parser },
        } },
    };
}

json parse(const json & request) {
    static std::map<std::string, common_chat_parser_params> known;

    const std::string key = text_of(request, "key");
    if (request.contains("format")) {
        const json & format = request.at("format");
        common_chat_parser_params params;
        params.format            = (common_chat_format) format.at("kind").get<int>();
        params.reasoning_format  = COMMON_REASONING_FORMAT_AUTO;
        params.generation_prompt = text_of(format, "start");
        const std::string parser = text_of(format, "parser");
        if (!parser.empty()) {
            params.parser.load(parser);
        }
        if (known.size() == 16) {
            known.clear();
        }
        known[key] = params;
    }
    const auto found = known.find(key);
    if (found == known.end()) {
        throw std::invalid_argument("unknown key");
    }

    const auto message = common_chat_parse(text_of(request, "text"), flag_of(request, "partial"), found->second);

    json calls = json::array();
    for (const auto & call : message.tool_calls) {
        calls.push_back(json{ { "id", call.id }, { "name", call.name }, { "arguments", call.arguments } });
    }
    return json{
        { "content",   message.render_content() },
        { "reasoning", message.reasoning_content },
        { "calls",     calls },
    };
}

char * run(const char * request, const std::function<json(const json &)> & work) {
    std::string answer;
    try {
        answer = work(json::parse(request)).dump();
    } catch (const std::exception & error) {
        answer = json{ { "error", error.what() } }.dump();
    }
    return strdup(answer.c_str());
}

}

POP_CHAT_API char * pop_chat_render(const char * request) { return run(request, render); }
POP_CHAT_API char * pop_chat_parse (const char * request) { return run(request, parse);  }
POP_CHAT_API void   pop_chat_free  (char * text)          { free(text); }
