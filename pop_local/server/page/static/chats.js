// Chats in the browser's storage, each a record of its own, so that tabs do not undo each other.
// `heads` has what the list shows of each, since chats hold documents.

const database = new Promise((resolve, reject) => {
  const request = indexedDB.open("pop-local", 1);
  request.onupgradeneeded = () => {
    for (const name of ["heads", "chats"]) {
      request.result.createObjectStore(name, { keyPath: "id" });
    }
  };
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
database.catch(() => {}); // whoever uses it is told

const tabs = new BroadcastChannel("pop-local chats");

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

// Does work on both stores; resolves when it is on disk.
async function change(work) {
  const transaction = (await database).transaction(["heads", "chats"], "readwrite");
  const complete = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  await work(transaction.objectStore("heads"), transaction.objectStore("chats"));
  await complete;
}

const store = async (name) => (await database).transaction(name).objectStore(name);

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

// Id and title of each, the latest first.
export async function list() {
  const heads = await result((await store("heads")).getAll());
  return heads.sort((one, other) => other.changed - one.changed);
}

export const load = async (id) => result((await store("chats")).get(id));

// Keeps a chat. One that another tab has changed meanwhile is kept beside that, by a new id.
export async function save(chat) {
  await change(async (heads, chats) => {
    const stored = await result(chats.get(chat.id));
    if (stored && stored.version !== chat.version) {
      chat.id = newId();
      chat.title += " (copy)";
    }
    chat.version = newId();
    chats.put(chat);
    heads.put({ id: chat.id, title: chat.title, changed: Date.now() });
  });
  tabs.postMessage(chat.id);
}

export async function remove(id) {
  await change((heads, chats) => {
    heads.delete(id);
    chats.delete(id);
  });
  tabs.postMessage(id);
}

// Calls with the id of each chat that another tab changes.
export function onChange(listener) {
  tabs.onmessage = ({ data }) => listener(data);
}
