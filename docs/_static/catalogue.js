// The filters of the catalogue: role, bits, granularity, scale, and any text. Without this script the page shows all tables.
(() => {
  const place = document.getElementById("catalogue-filter");
  if (!place) return;
  const rows = [];
  for (const section of document.querySelectorAll("section")) {
    const table = section.querySelector(":scope > .table-wrapper table, :scope > table");
    const heading = section.querySelector(":scope > h2");
    if (!table || !heading) continue;
    const role = heading.firstChild.textContent.trim().toLowerCase();
    for (const row of table.querySelectorAll("tbody tr")) {
      const [, format, granularity, scale] = [...row.cells].map((c) => c.textContent.trim());
      const codebook = format.match(/codebook of (\d+)/);
      const digits = format.match(/(?:int|fp)(\d+)/);
      const bits = format === "binary" ? "1" : codebook ? String(Math.ceil(Math.log2(+codebook[1]))) : digits ? digits[1] : "";
      rows.push({ row, section, role, bits, granularity: granularity.split(" ")[0], scale: scale.split(" ")[0],
        text: row.textContent.toLowerCase() });
    }
  }
  const form = document.createElement("form");
  form.className = "catalogue-filter";
  form.addEventListener("submit", (event) => event.preventDefault());
  const labelled = (name, field) => {
    const label = document.createElement("label");
    label.append(name, field);
    form.append(label);
    field.addEventListener("input", filter);
    return field;
  };
  const choice = (name, key) => {
    const field = document.createElement("select");
    const values = [...new Set(rows.map((r) => r[key]).filter(Boolean))];
    values.sort((a, b) => a - b || a.localeCompare(b));
    field.add(new Option("any", ""));
    for (const value of values) field.add(new Option(value, value));
    return labelled(name, field);
  };
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "LSQ, fp8, dynamic ...";
  labelled("text", search);
  const choices = { role: choice("role", "role"), bits: choice("bits", "bits"),
    granularity: choice("a scale per", "granularity"), scale: choice("scale from", "scale") };
  const count = document.createElement("output");
  form.append(count);
  place.append(form);

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = new Set();
    let number = 0;
    for (const r of rows) {
      const fits = Object.entries(choices).every(([key, field]) => !field.value || r[key] === field.value)
        && words.every((word) => r.text.includes(word));
      r.row.classList.toggle("hidden-by-filter", !fits);
      if (fits) { shown.add(r.section); number += 1; }
    }
    for (const r of rows) r.section.classList.toggle("hidden-by-filter", !shown.has(r.section));
    count.textContent = `${number} of ${rows.length}`;
  }
  filter();
})();
