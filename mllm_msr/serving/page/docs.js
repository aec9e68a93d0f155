// The endpoints of openapi.json: what each takes, and what it answers.

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

const nameOf = (schema) => schema.$ref?.split("/").pop();

function typeOf(schema) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  return schema.type === "array" ? `list of ${typeOf(schema.items)}` : schema.type ?? "any";
}

function limitsOf(schema) {
  const names = { minimum: "at least", maximum: "at most", maxLength: "characters at most", maxItems: "items at most" };
  const limits = Object.entries(names).flatMap(([name, text]) =>
    name in schema ? [`${text} ${schema[name]}`] : []);
  if (schema.default !== undefined && schema.default !== null) limits.push(`default ${schema.default}`);
  return limits.join(", ");
}

function makeTable(caption, rows) {
  const head = make("tr", "", ...["name", "type", "meaning"].map((text) => {
    const cell = make("th", text);
    cell.scope = "col";
    return cell;
  }));
  const body = rows.map(([name, required, schema, text]) => {
    const first = make("th", required ? `${name} (required)` : name);
    first.scope = "row";
    const meaning = [text ?? schema.description, limitsOf(schema)].filter(Boolean).join("; ");
    return make("tr", "", first, make("td", typeOf(schema)), make("td", meaning || "as named"));
  });
  return make("table", "", make("caption", caption), make("thead", "", head), make("tbody", "", ...body));
}

function makeFields(name, schemas) {
  const { properties, required = [] } = schemas[name];
  const rows = Object.entries(properties).map(([field, schema]) => [field, required.includes(field), schema]);
  return makeTable(name, rows);
}

function makeEndpoint(path, method, operation, schemas) {
  const section = make("section", "", make("h2", `${method.toUpperCase()} ${path}`));
  section.append(make("p", operation.description));
  if (operation.parameters) {
    section.append(makeTable("Parameters", operation.parameters.map((each) =>
      [each.name, each.required, each.schema, each.description])));
  }
  const body = operation.requestBody?.content["application/json"]?.schema;
  if (body) section.append(makeFields(nameOf(body), schemas));
  const answer = operation.responses["200"].content?.["application/json"]?.schema;
  if (answer?.$ref) section.append(makeFields(nameOf(answer), schemas));
  const refusals = Object.entries(operation.responses).filter(([status]) => status !== "200");
  section.append(make("ul", "", ...refusals.map(([status, { description }]) =>
    make("li", `${status}: ${description}`))));
  return section;
}

const { paths, components } = await (await fetch("/openapi.json")).json();
document.getElementById("main").append(...Object.entries(paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) =>
    makeEndpoint(path, method, operation, components.schemas))));
