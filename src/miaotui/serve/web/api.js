// The server, over its OpenAI-compatible endpoints. Addresses are relative, so the page works below any prefix.

import { tab } from "./store.js";

/**
 * A call that failed. `kind` is what the page has words for: network, key, model, long, refused, busy, starting,
 * server or broken; `detail` is the server's own sentence, `retryAfter` its advice in seconds.
 */
export class ApiError extends Error {
  constructor(kind, { detail = "", retryAfter = null, status = 0 } = {}) {
    super(detail || kind);
    Object.assign(this, { kind, detail, retryAfter, status });
  }
}

export const key = {
  get: () => tab.get("key"),
  set: (value) => tab.set("key", value),
};

/** One answered request, or an ApiError. An abort comes through as the browser's own AbortError. */
export async function call(path, { body, signal } = {}) {
  const headers = new Headers();
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  if (body) headers.set("Content-Type", "application/json");
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said = {};
  try {
    said = (await response.json()).error ?? {};
  } catch {
    // Not JSON: a proxy spoke. The status says enough.
  }
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After")) || null;
  const detail = typeof said.message === "string" ? said.message : "";
  return new ApiError(kindOf(response.status, said.code), { detail, retryAfter, status: response.status });
}

function kindOf(status, code) {
  if (status === 401 || status === 403) return "key";
  if (status === 404) return "model";
  if (code === "context_length_exceeded" || status === 413) return "long";
  if (status === 429) return "busy";
  if (status === 503) return "starting";
  return status >= 500 ? "server" : "refused";
}

/**
 * Streams one chat completion: `onText(piece)` for each piece of the answer. Returns `{ finish, usage }`, with
 * `usage` null where the server sent none.
 */
export async function streamChat(body, { signal, onText }) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", { body: request, signal });
  let finish = null;
  let usage = null;
  let done = false;
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError("broken", { detail: chunk.error.message ?? "" });
    usage = chunk.usage ?? usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
  }
  if (!done && finish === null) throw new ApiError("broken");
  return { finish, usage };
}

/** The `data:` payloads of a server-sent event stream (WHATWG HTML, section 9.2), however its bytes are cut. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) {
        const line = part.endsWith("\r") ? part.slice(0, -1) : part;
        if (line.startsWith("data:")) lines.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("broken");
  } finally {
    reader.cancel().catch(() => {});
  }
}
