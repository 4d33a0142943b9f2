// The server's figures: Prometheus text in, one sample per scrape out.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(\S+)/;
const PREFIX = "miaotui:";

/** Name → value of the server's own series, summed over their labels. Buckets of histograms are left out. */
export function parse(text) {
  const figures = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match || !match[1].startsWith(PREFIX) || match[1].endsWith("_bucket")) continue;
    const name = match[1].slice(PREFIX.length);
    const value = Number(match[2]);
    if (Number.isFinite(value)) figures.set(name, (figures.get(name) ?? 0) + value);
  }
  return figures;
}

/**
 * What the charts show of one scrape, given the one before it: `{ time, rate, running, waiting, cache, first }`.
 * Null where nothing can be said: no rate without an earlier scrape, no time to first token without a first token.
 */
export function sample(now, figures, before) {
  const grown = (name) => {
    const [is, was] = [figures.get(name), before?.figures.get(name)];
    return is === undefined || was === undefined || is < was ? null : is - was;
  };
  const tokens = grown("generation_tokens_total");
  const firsts = grown("time_to_first_token_seconds_count");
  return {
    time: now,
    rate: tokens === null ? null : tokens / (now - before.time),
    running: figures.get("num_requests_running") ?? null,
    waiting: figures.get("num_requests_waiting") ?? null,
    cache: figures.get("kv_cache_usage_perc") ?? null,
    first: firsts ? grown("time_to_first_token_seconds_sum") / firsts : null,
  };
}
