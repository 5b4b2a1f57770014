// Keeps the page and the model for use without a network. With one, newer files win.

// Another model or LiteRT.js makes version.js another file, and browsers then install everything afresh.
importScripts("version.js");
const PREFIX = `${registration.scope} `;
const CACHE = PREFIX + VERSION;
const FILES = [
  "./", "app.js", "style.css", "manifest.webmanifest", "icon.svg", "icon.png",
  "model.json", "model_int8.tflite",
  "litert/index.js", "litert/wasm-utils.js",
  "litert/litert_wasm_compat_internal.js", "litert/litert_wasm_compat_internal.wasm",
];

/** A request that asks the host whether the browser's copy is still the newest: a page must not mix two models. */
function fresh(request) {
  return new Request(request, { cache: "no-cache" });
}

oninstall = (event) => {
  skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES.map(fresh))));
};

onactivate = (event) => event.waitUntil((async () => {
  const old = (await caches.keys()).filter((key) => key.startsWith(PREFIX) && key !== CACHE);
  await Promise.all(old.map((key) => caches.delete(key)));
  await clients.claim();
})());

onfetch = (event) => event.respondWith((async () => {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(fresh(event.request));
    // The wasm is large and only changes with the whole cache.
    if (response.ok && event.request.method === "GET" && !event.request.url.endsWith(".wasm")) {
      event.waitUntil(cache.put(event.request, response.clone()));
    }
    return response;
  } catch (error) {
    const kept = await cache.match(event.request, { ignoreSearch: true });
    if (kept) return kept;
    if (event.request.mode === "navigate") return cache.match("./"); // index.html by that name
    throw error;
  }
})());
