// What the page remembers. Storage may be denied (private windows, policies): then nothing is kept and nothing breaks.

const PREFIX = "miaotui.";

function read(storage, name, otherwise) {
  try {
    const text = window[storage].getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

function write(storage, name, value) {
  try {
    if (value === null || value === undefined) window[storage].removeItem(PREFIX + name);
    else window[storage].setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Denied or full: the page works on without it.
  }
}

/** Kept for good on this device: language, theme, settings. */
export const device = {
  get: (name, otherwise = null) => read("localStorage", name, otherwise),
  set: (name, value) => write("localStorage", name, value),
};

/** Kept until this tab is closed: the API key and the conversation. */
export const tab = {
  get: (name, otherwise = null) => read("sessionStorage", name, otherwise),
  set: (name, value) => write("sessionStorage", name, value),
};
