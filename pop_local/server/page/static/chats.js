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

// Changes the store, waits until the change is on disk, and notifies other tabs.
async function change(work) {
  const chats = await store("readwrite");
  const complete = new Promise((resolve, reject) => {
    chats.transaction.oncomplete = resolve;
    chats.transaction.onabort = () => reject(chats.transaction.error);
  });
  const id = await work(chats);
  await complete;
  tabs.postMessage(id);
}

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
export const load = async (id) => result((await store("readonly")).get(keys(id)));

// Resolves to each chat's [id, title], latest first.
export const list = async () => (await result((await store("readonly")).getAllKeys())).reverse();

// Saves a chat; if another tab has changed it, saves it as a copy with a new id.
export async function save(chat) {
  const version = newId();
  await change(async (chats) => {
    const stored = await result(chats.get(keys(chat.id)));
    if (stored && stored.version !== chat.version) {
      Object.assign(chat, { id: newId(), title: `${chat.title} (copy)` });
    }
    chats.put({ ...chat, version });
    return chat.id;
  });
  chat.version = version;
}

export const remove = (id) => change((chats) => {
  chats.delete(keys(id));
  return id;
});

// Calls `listener` with the id of each chat that another tab changes.
export const onChange = (listener) => (tabs.onmessage = ({ data }) => listener(data));
