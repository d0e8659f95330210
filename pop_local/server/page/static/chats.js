// Chats in the browser's storage. Each chat has a separate record, so that tabs do not overwrite each
// other's chats. A record's key contains the chat's id and title, so listing chats reads no records.

const tabs = new BroadcastChannel("pop-local chats");
const result = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const opening = indexedDB.open("pop-local", 1);
opening.onupgradeneeded = () =>
  opening.result.createObjectStore("chats", { keyPath: ["id", "title"] });
const database = result(opening);
database.catch(() => {}); // the functions that use the database report the error
const store = async (mode) => (await database).transaction("chats", mode).objectStore("chats");
const keys = (id) => IDBKeyRange.bound([id], [id, []]);

// Changes the store, waits until the change is on disk, and notifies other tabs. An error undoes the
// whole change.
async function change(work) {
  const chats = await store("readwrite");
  const complete = new Promise((resolve, reject) => {
    chats.transaction.oncomplete = resolve;
    chats.transaction.onabort = () => reject(chats.transaction.error);
  });
  complete.catch(() => {}); // awaited below
  let changed;
  try {
    changed = await work(chats);
  } catch (error) {
    if (!chats.transaction.error) chats.transaction.abort();
    throw chats.transaction.error ?? error;
  }
  await complete;
  tabs.postMessage(changed.id);
  return changed;
}

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
export const load = async (id) => result((await store("readonly")).get(keys(id)));

// Resolves to each chat's [id, title], latest first.
export const list = async () => (await result((await store("readonly")).getAllKeys())).reverse();

// Calls `visit` with each chat, latest first, and keeps only one chat in memory at a time.
export async function each(visit) {
  const request = (await store("readonly")).openCursor(null, "prev");
  await new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      if (!request.result) return resolve();
      visit(request.result.value);
      request.result.continue();
    };
  });
}

// Saves a chat; if another tab has changed it, saves it as a copy with a new id.
export async function save(chat) {
  const version = newId();
  await change(async (chats) => {
    const stored = await result(chats.get(keys(chat.id)));
    if (stored && stored.version !== chat.version) {
      Object.assign(chat, { id: newId(), title: `${chat.title} (copy)` });
    }
    chats.delete(keys(chat.id)); // the record may have an earlier title
    chats.put({ ...chat, version });
    return { id: chat.id };
  });
  chat.version = version;
}

// Saves all given chats or none. A chat whose id is taken by a different version gets a new id, which
// is the same for each import. Resolves to the number of chats that were added, and of those that
// were already stored.
export const addAll = (given) => change(async (chats) => {
  const counts = { added: 0, present: 0 };
  for (const chat of given) {
    let { id, title } = chat;
    let stored = await result(chats.get(keys(id)));
    while (stored && stored.version !== chat.version) {
      [id, title] = [id + chat.version, `${chat.title} (imported)`];
      stored = await result(chats.get(keys(id)));
    }
    if (!stored) chats.add({ ...chat, id, title });
    counts[stored ? "present" : "added"] += 1;
  }
  return counts;
});

export const remove = (id) => change((chats) => {
  chats.delete(keys(id));
  return { id };
});

// Calls `listener` with the id of each chat that another tab changes (undefined: several chats).
export const onChange = (listener) => (tabs.onmessage = ({ data }) => listener(data));
