// openai for node: a streamed chat with a tool, a parsed answer, a streamed response.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.KVIST_URL}/v1`, apiKey: "none" });
const parameters = {
  type: "object",
  properties: { city: { type: "string" }, degrees: { type: "integer" } },
  required: ["city", "degrees"],
  additionalProperties: false,
};
const question = { role: "user", content: "How warm is Oslo?" };
const stream = client.chat.completions.stream({
  model: "tiny",
  messages: [question],
  tools: [{ type: "function", function: { name: "report", parameters, strict: true } }],
});
const message = (await stream.finalChatCompletion()).choices[0].message;
assert.equal(message.tool_calls[0].function.arguments, '{"city": "Oslo", "degrees": 7}');
const tools = [{ type: "function", name: "report", parameters, strict: true }];
const first = await client.responses.create({ model: "tiny", input: "How warm is Oslo?", tools });
const call = first.output.find((item) => item.type === "function_call");
const events = await client.responses.create({
  model: "tiny",
  previous_response_id: first.id,
  input: [{ type: "function_call_output", call_id: call.call_id, output: "7" }],
  tools,
  stream: true,
});
let text = "";
for await (const event of events) if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, "It is 7 degrees in Oslo.");
