// The page at /. Texts of data enter the document as textContent alone, so none is read as HTML.

const SHOWN = 12; // items of a ranking
const find = (id) => document.getElementById(id);
const history = []; // items, oldest first
const images = new Map(); // addresses of images that were fetched, by item
let key = ""; // kept in memory alone
let again = () => start(); // what is asked again with a key

class RefusedError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers };
  if (body) {
    headers["Content-Type"] = "application/json";
    options.method = "POST";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options).catch(() => {
    throw new RefusedError(0, "the service does not answer");
  });
  if (!answer.ok) {
    const refusal = await answer.json().catch(() => ({}));
    throw new RefusedError(answer.status, refusal.error ?? answer.statusText);
  }
  return answer;
}

const askJson = async (path, body) => (await ask(path, body)).json();

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

// Runs a task that asks the service, and says what went wrong.
async function attempt(task, doing = "") {
  again = () => attempt(task, doing);
  say(doing);
  document.body.setAttribute("aria-busy", "true");
  try {
    await task();
    say("");
  } catch (error) {
    if (!(error instanceof RefusedError)) throw error;
    if (error.status === 401) find("key-form").hidden = false;
    say(error.message, true);
  } finally {
    document.body.removeAttribute("aria-busy");
  }
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// An <img> cannot send a key, so images are fetched.
async function showImage(image, item) {
  if (!images.has(item)) {
    images.set(item, ask(`/items/${encodeURIComponent(item)}/image`)
      .then((answer) => answer.blob())
      .then((blob) => URL.createObjectURL(blob)));
  }
  try {
    image.src = await images.get(item);
    image.hidden = false;
    image.nextElementSibling.remove(); // the blank in its place
  } catch {
    images.delete(item); // asked again with the next card
  }
}

function makeCard({ item, title, image: hasImage }) {
  const card = make("li");
  const image = make("img");
  image.alt = ""; // the title stands below it
  image.hidden = true;
  card.append(image, make("span", undefined, "blank"));
  card.append(make("p", title ?? item, "title"), make("p", item, "facts"));
  if (hasImage) showImage(image, item);
  return card;
}

function addButton(card, text, label, act) {
  const button = make("button", text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", act);
  card.append(button);
}

function showHistory() {
  find("history").replaceChildren(...history.map((each, index) => {
    const card = makeCard(each);
    addButton(card, "Remove", `Remove ${each.title ?? each.item}`, () => {
      history.splice(index, 1);
      showHistory();
      const left = find("history").querySelectorAll("button");
      (left[Math.min(index, left.length - 1)] ?? find("search")).focus();
    });
    return card;
  }));
  find("history-note").textContent = history.length ? "Oldest first." : "No item yet.";
  find("recommend").disabled = find("clear").disabled = history.length === 0;
}

function addToHistory(each) {
  history.push(each);
  find("user").value = "";
  showHistory();
  say(`${each.title ?? each.item}: number ${history.length} of the history`);
}

function showItems(items) {
  find("items").replaceChildren(...items.map((each) => {
    const card = makeCard(each);
    card.append(make("p", `${each.interactions} interactions`, "facts"));
    addButton(card, "Add", `Add ${each.title ?? each.item} to the history`, () => addToHistory(each));
    return card;
  }));
  if (!items.length) find("items").append(make("li", "No item has all these words."));
}

function showAnswer(answer) {
  find("preferences").replaceChildren(...answer.preferences.map((text) => make("li", text)));
  find("preferences").hidden = find("preference-heading").hidden = !answer.preferences.length;
  find("ranking").replaceChildren(...answer.items.map((each) => {
    const card = makeCard(each);
    if (each.p_yes === null) {
      card.append(make("p", `rank ${each.rank}`, "facts"));
    } else {
      const meter = make("meter");
      meter.value = each.p_yes;
      meter.setAttribute("aria-label", `p(yes) of ${each.title ?? each.item}`);
      card.append(make("p", `${each.rank}. p(yes) ${each.p_yes.toFixed(3)}`, "facts"), meter);
    }
    return card;
  }));
  find("answer").hidden = false;
  find("ranking-heading").focus();
}

async function recommendToUser() {
  const user = find("user").value;
  const answer = await askJson(`/recommend?${new URLSearchParams({ user, k: SHOWN })}`);
  history.splice(0, history.length, ...answer.history);
  showHistory();
  showAnswer(answer);
}

async function recommendForHistory() {
  showAnswer(await askJson("/recommend", { history: history.map(({ item }) => item), k: SHOWN }));
}

async function listUsers() {
  const { users } = await askJson(`/users?${new URLSearchParams({ prefix: find("user").value })}`);
  find("users").replaceChildren(...users.map((user) => {
    const option = make("option");
    option.value = user;
    return option;
  }));
}

async function search() {
  const { items } = await askJson(`/items?${new URLSearchParams({ search: find("search").value })}`);
  showItems(items);
}

const start = () => attempt(async () => {
  await listUsers();
  await search();
});

function onSubmit(form, act) {
  find(form).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

onSubmit("user-form", () => attempt(recommendToUser, "The model ranks…"));
onSubmit("search-form", () => attempt(search));
onSubmit("key-form", () => {
  key = find("key").value;
  find("key-form").hidden = true;
  again().then(() => find("items").childElementCount || start());
});
find("user").addEventListener("input", () => listUsers().catch(() => {}));
find("recommend").addEventListener("click", () => attempt(recommendForHistory, "The model ranks…"));
find("clear").addEventListener("click", () => {
  history.length = 0;
  showHistory();
  find("answer").hidden = true;
  find("search").focus();
});
start();
