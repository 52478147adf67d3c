// What an offline page does: draws its figures, and lets clicks change what linked views show.

const read = (selector) => JSON.parse(document.querySelector(selector).textContent);

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

async function unpack(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// Numbers that were packed as whole ones of 8 or 16 bits; the largest stands for "missing".
function decoder({bits, low, high, root}) {
  const most = 2 ** bits - 2;
  const value = (code) => low + (high - low) * (root ? (code / most) ** 2 : code / most);
  return Float32Array.from({length: most + 2}, (_, code) => (code > most ? NaN : value(code)));
}

// The part of an array that an index chooses: nested arrays of the axes that it leaves (null) whole.
function unpacked(array, buffer, index) {
  const {shape, start, bits} = array;
  array.values ??= decoder(array);
  array.codes ??= new (bits === 8 ? Uint8Array : Uint16Array)(buffer, start);
  const steps = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const kept = shape.map((_, axis) => axis).filter((axis) => (index[axis] ?? null) === null);
  const first = index.reduce((place, value, axis) => place + (value ?? 0) * steps[axis], 0);
  const part = (level, place) => {
    if (level === kept.length) return array.values[array.codes[place]];
    const [length, step] = [shape[kept[level]], steps[kept[level]]];
    if (level < kept.length - 1) {
      return Array.from({length}, (_, i) => part(level + 1, place + i * step));
    }
    const row = new Float32Array(length);
    for (let i = 0; i < length; i++) row[i] = array.values[array.codes[place + i * step]];
    return row;
  };
  return part(0, first);
}

// The largest of each square of so many numbers a side; missing ones do not count.
function pooled(rows, size) {
  const side = (n) => Math.ceil(n / size);
  const result = Array.from({length: side(rows.length)}, () =>
    new Float32Array(side(rows[0].length)).fill(NaN),
  );
  rows.forEach((row, y) => {
    const into = result[Math.floor(y / size)];
    row.forEach((value, x) => {
      const at = Math.floor(x / size);
      if (!(into[at] >= value) && !Number.isNaN(value)) into[at] = value;
    });
  });
  return result;
}

function pick(array, buffer, index) {
  return Array.isArray(array) ? index.reduce((part, i) => part[i], array) : unpacked(array, buffer, index);
}

async function linked(part, tools) {
  const spec = JSON.parse(part.querySelector(".spec").textContent);
  const buffer = await unpack(part.querySelector(".blob").textContent);
  const state = spec.state;
  const label = (trait, value) => spec.labels[trait]?.[value] ?? String(value);
  const filled = (text) => text.replace(/\{(\w+)\}/g, (_, trait) => label(trait, state[trait]));
  const selects = new Map();

  const views = spec.views.map((view) => {
    const root = part.querySelector(`[data-view="${view.name}"]`);
    const onClick = (event) => {
      const changes = {};
      for (const [axis, trait] of Object.entries(view.clicks)) {
        // A click outside of what is stored, such as a token that came later, changes nothing.
        if (event[axis] in (spec.labels[trait] ?? {})) changes[trait] = event[axis];
      }
      choose(changes);
    };
    return {...view, box: new View(root, {...tools, onClick})};
  });

  function draw(view) {
    const data = view.spec.data?.map((trace) => ({...trace}));
    const shown = {...view.spec, ...(data && {data})};
    for (const {trace, attribute, array, index, pool} of view.fills) {
      const whole = pick(spec.arrays[array], buffer, index.map((trait) => state[trait] ?? null));
      const value = pool > 1 ? pooled(whole, pool) : whole;
      if (trace === null) shown[attribute] = value;
      else shown.data[trace][attribute] = value;
    }
    const marks = {};
    for (const [trait, axis] of Object.entries(view.marks)) marks[axis] = state[trait];
    const caption = filled(view.caption);
    return view.box.show({kind: view.kind, caption, spec: shown, marks});
  }

  function choose(changes) {
    Object.assign(state, changes);
    for (const [trait, select] of selects) select.value = state[trait];
    const touched = (view) => view.reads.some((trait) => trait in changes);
    return Promise.all(views.filter(touched).map(draw));
  }

  for (const select of part.querySelectorAll("select")) {
    selects.set(select.dataset.trait, select);
    select.value = state[select.dataset.trait];
    select.addEventListener("change", () => choose({[select.dataset.trait]: Number(select.value)}));
  }
  for (const view of views) await draw(view);
  part.linkedState = state;
}

async function drawAll() {
  const gzipped = document.getElementById("plotly").textContent;
  const Plotly = gzipped ? await loadPlotly(bytes(gzipped)) : null;
  const tools = {Plotly, templates: read("#templates")};
  for (const figure of document.querySelectorAll("figure")) {
    const spec = JSON.parse(figure.querySelector(".spec").textContent);
    const view = new View(figure.querySelector(".plot"), tools);
    await view.show({kind: "figure", caption: "", spec, marks: {}});
    // A breath between them, so that the page can be read meanwhile.
    await new Promise((resolve) => setTimeout(resolve));
  }
  for (const part of document.querySelectorAll(".linked")) await linked(part, tools);
  document.documentElement.dataset.drawn = "all";
}

drawAll().catch((error) => {
  document.documentElement.dataset.failed = String(error);
  throw error;
});
