// The npm packages `openai` and `ai` (Vercel) as their users call them. Arguments: address, key.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const asked = { model: "demo", max_tokens: 12, temperature: 0, user: "u1" };
const messages = [{ role: "developer", content: "be brief" }, { role: "user", content: "12 + 345?" }];
const first = await client.chat.completions.create({ ...asked, messages });
assert.equal(first.usage.completion_tokens, 12);
messages.push(first.choices[0].message, { role: "user", content: "and?" });
const second = await client.chat.completions.create({ ...asked, messages });
let text = "";
let usage = null;
const stream_options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ ...asked, messages, stream: true, stream_options })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, second.choices[0].message.content);
assert.equal(usage.completion_tokens, 12);
const tooLong = client.chat.completions.create({ ...asked, messages: [{ role: "user", content: "ab ".repeat(1600) }] });
await assert.rejects(tooLong, (error) => error.status === 400 && error.code === "context_length_exceeded");

const provider = createOpenAICompatible({ name: "tc-ray", baseURL: `${url}/v1`, apiKey: key });
const given = { model: provider("demo"), maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
const turns = [{ role: "user", content: "12 + 345?" }];
const whole = await generateText({ ...given, messages: turns });
turns.push(...whole.response.messages, { role: "user", content: "and?" });
const again = await generateText({ ...given, messages: turns });
let streamed = "";
for await (const piece of streamText({ ...given, messages: turns }).textStream) streamed += piece;
assert.equal(streamed, again.text);
assert.equal(again.usage.outputTokens, 12);
