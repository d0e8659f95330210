// Chats in the browser's storage, each a record of its own, so that tabs do not undo each other.
// A record's key is its id and title: the list is made of keys, without reading any document.

const tabs = new BroadcastChannel("pop-local chats");
const result = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const opening = indexedDB.open("pop-local", 1);
opening.onupgradeneeded = () =>
  opening.result.createObjectStore("chats", { keyPath: ["id", "title"] });
const database = result(opening);
database.catch(() => {}); // whoever uses it is told
const store = async (mode) => (await database).transaction("chats", mode).objectStore("chats");
const keys = (id) => IDBKeyRange.bound([id], [id, []]);

// Works on the store; resolves when that is on disk, and tells the other tabs.
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

// Resolves to [id, title] of each, the latest first.
export const list = async () => (await result((await store("readonly")).getAllKeys())).reverse();

// Keeps a chat. One that another tab has changed meanwhile is kept beside that, by a new id.
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

// Calls with the id of each chat that another tab changes.
export const onChange = (listener) => (tabs.onmessage = ({ data }) => listener(data));
