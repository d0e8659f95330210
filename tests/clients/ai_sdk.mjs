// Calls a tool and streams text with Vercel's AI SDK. Prints the results as JSON (test_ai_sdk.py).
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const [, , baseURL, parameters] = process.argv;
const model = createOpenAICompatible({ name: "pop-local", baseURL, includeUsage: true })("tiny");
const double = tool({
  description: "Twice as much",
  inputSchema: jsonSchema(JSON.parse(parameters)),
  execute: async ({ n }) => 2 * n,
});
const asked = { model, prompt: "How much is twice four?", temperature: 0 };

const called = await generateText({
  ...asked,
  tools: { double },
  toolChoice: "required",
  maxOutputTokens: 600,
});
const whole = await generateText({ ...asked, maxOutputTokens: 8 });
const stream = streamText({ ...asked, maxOutputTokens: 8 });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
console.log(
  JSON.stringify({
    input: called.toolCalls[0].input,
    output: called.toolResults[0].output,
    reason: called.finishReason,
    whole: whole.text,
    streamed,
    usage: await stream.usage,
  }),
);
