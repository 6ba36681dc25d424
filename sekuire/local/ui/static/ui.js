// The dashboard's own script: signals and regions, times, charts, ticks, dialogs, shortcuts. No framework beside htmx.
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const body = document.body;

  // -- morphing keeps what a person has typed, ticked, opened or focused ----------------------------------------------
  Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) => {
    if (name === "open") return !(node.matches("details, dialog"));
    if (name === "checked" || name === "value") return node.type === "hidden" || !node.matches("input, textarea, select, option");
    if (name === "disabled") return !node.matches("[data-needs-ticks]");
    return !(name === "class" && node.matches(".copy"));
  };
  Idiomorph.defaults.callbacks.beforeNodeMorphed = (old, fresh) => {
    if (old.nodeType !== 1 || fresh.nodeType !== 1) return true;
    if (old.matches("time") && fresh.matches("time")) return old.dateTime !== fresh.dateTime || old.dataset.kind !== fresh.dataset.kind;
    if (old.matches(".chart") && fresh.matches(".chart")) {
      old.dataset.series = fresh.dataset.series;
      draw(old);
      return false;
    }
    return true;
  };

  // -- signals: the server says which topics changed; regions fetch themselves, at most once a second -----------------
  const holder = $("#signals"), state = $("#live-state"), words = $("#live-text"), age = $("#live-age"), pause = $("#pause");
  const due = new Set(), SECOND = 1000;
  let isPaused = false, isOpen = false, wasOpen = false, updated = Date.now(), lastFetch = 0, timer = 0, retries = 0;

  const show = (kind, text) => {
    state.classList.toggle("on", kind === "on");
    state.classList.toggle("off", kind === "off");
    if (words.textContent !== text) words.textContent = text;
  };
  const connect = () => {
    holder.replaceChildren();
    const source = document.createElement("div");
    source.setAttribute("hx-ext", "sse");
    source.setAttribute("sse-connect", "/ui/events");
    source.innerHTML = '<i hx-trigger="sse:signal"></i><i hx-trigger="sse:ping"></i>';
    holder.append(source);
    htmx.process(source);
  };
  const disconnect = () => {
    isOpen = false;
    if (holder.firstChild) htmx.swap(holder, "", { swapStyle: "innerHTML" });
  };
  const want = (topics) => {
    for (const region of $$('[data-topics]:not([data-topics=""])')) {
      if (!topics || region.dataset.topics.split(" ").some((topic) => topics.includes(topic))) due.add(region.id);
    }
    if (!isPaused && !document.hidden && due.size && !timer) {
      timer = setTimeout(fetchRegions, Math.max(0, lastFetch + SECOND - Date.now()));
    }
  };
  const fetchRegions = () => {
    timer = 0;
    if (isPaused || document.hidden) return;
    lastFetch = Date.now();
    for (const id of due) {
      const region = document.getElementById(id);
      // An open dialog would be closed with what it belongs to.
      if (region && $("dialog[open]", region)) continue;
      if (region) htmx.trigger(region, "refresh");
      due.delete(id);
    }
  };
  body.addEventListener("htmx:sseOpen", () => {
    const again = wasOpen || retries;
    isOpen = wasOpen = true;
    retries = 0;
    updated = Date.now();
    if (again) want(null);
    tick();
  });
  body.addEventListener("htmx:sseError", async () => {
    isOpen = false;
    retries += 1;
    tick();
    try {
      const answer = await fetch("/ui/live", { cache: "no-store" });
      if (answer.status === 401) return signedOut();
      const problem = answer.ok ? (await answer.json()).problem : "";
      if (problem && !isOpen) show("off", problem);
    } catch { /* The platform is not there; the extension tries again. */ }
  });
  body.addEventListener("sse:signal", (event) => {
    updated = Date.now();
    want(JSON.parse(event.detail.data));
  });
  body.addEventListener("sse:ping", () => { updated = Date.now(); });
  body.addEventListener("htmx:beforeOnLoad", (event) => { if (event.detail.xhr.status === 401) signedOut(); });
  const signedOut = () => {
    disconnect();
    isPaused = true;
    show("off", "signed out: sekuire dev --link");
    age.textContent = "";
    pause.hidden = true;
  };
  document.addEventListener("visibilitychange", () => {
    if (pause.hidden) return;
    if (document.hidden) disconnect();
    else if (!isPaused) { connect(); want(null); }
  });
  pause.addEventListener("click", () => {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", isPaused);
    pause.textContent = isPaused ? "Go on" : "Pause";
    if (isPaused) disconnect();
    else { connect(); want(null); }
    tick();
  });
  setInterval(() => {
    if (isPaused || document.hidden) return;
    const now = Date.now() / 1000 | 0;
    for (const region of $$("[data-every]")) if (now % region.dataset.every === 0) due.add(region.id);
    if (due.size) want([]);
  }, SECOND);

  // -- times ----------------------------------------------------------------------------------------------------------
  const span = (s) => s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min${s < 600 ? ` ${Math.floor(s % 60)} s` : ""}` : s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min` : `${Math.floor(s / 86400)} d`;
  const ago = (s) => s < 1 ? "now" : s < 60 ? `${Math.floor(s)} s ago` : s < 3600 ? `${Math.floor(s / 60)} min ago` : s < 86400 ? `${Math.floor(s / 3600)} h ago` : `${Math.floor(s / 86400)} d ago`;
  const texts = { ago: (s) => ago(Math.max(0, s)), since: (s) => span(Math.max(0, s)), left: (s) => s >= 0 ? "now" : `in ${span(-s)}` };
  const tick = () => {
    const now = Date.now();
    for (const time of $$("time[data-kind]")) {
      const make = texts[time.dataset.kind];
      if (!make) continue;
      const text = make((now - Date.parse(time.dateTime)) / 1000);
      if (time.textContent !== text) time.textContent = text;
    }
    if (pause.hidden) return;
    age.textContent = isPaused ? "" : `· updated ${ago((now - updated) / 1000)}`;
    if (isPaused) show("", "paused");
    else if (isOpen) show("on", "live");
    else if (!words.textContent.includes("live already")) show("off", wasOpen || retries ? "reconnecting" : "connecting");
  };
  setInterval(tick, SECOND);

  // -- charts ---------------------------------------------------------------------------------------------------------
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name) && resolve(name);
  const probe = document.createElement("i");
  probe.hidden = true;
  body.append(probe);
  const resolve = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  const seconds = (v) => v == null ? "–" : v < 1 ? `${(v * 1000).toPrecision(v < .01 ? 2 : 3).replace(/\.0+$/, "")} ms` : `${v.toFixed(v < 10 ? 2 : 1)} s`;
  const plain = (v) => v == null ? "–" : v >= 100 || v === Math.round(v) ? `${Math.round(v)}` : v.toFixed(1);
  const kinds = {
    rate: [["completed", "completed", "--good", plain, true], ["failed", "failed", "--bad", plain]],
    time: [["p50", "p50", "--accent", seconds], ["p95", "p95", "--muted", seconds]],
    depth: [["queued", "queued", "--muted", plain, true], ["running", "running", "--accent", plain]],
  };
  const whole = [0, 1, 2, 3, 4, 5, 6].flatMap((n) => [1, 2, 5].map((m) => m * 10 ** n));
  const charts = new Map();
  const caption = (element, u, lines) => {
    const at = u.cursor.idx, keys = $$(".key span", element.parentNode);
    const last = (values) => { for (let n = values.length - 1; n >= 0; n--) if (values[n] != null) return values[n]; return null; };
    lines.forEach(([, , , text], n) => { if (keys[n]) keys[n].textContent = text(at == null ? last(u.data[n + 1]) : u.data[n + 1][at]); });
  };
  const draw = (element) => {
    const series = JSON.parse(element.dataset.series), lines = kinds[element.dataset.chart];
    const data = [series.at, ...lines.map(([key]) => series[key])];
    const known = charts.get(element);
    if (known) { known.setData(data); return caption(element, known, lines); }
    const format = lines[0][3], muted = colour("--muted"), grid = colour("--line");
    const axis = { stroke: muted, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const chart = new uPlot({
      width: element.clientWidth, height: element.clientHeight, cursor: { points: { size: 6 }, drag: { x: false, y: false } },
      legend: { show: false },
      hooks: { setLegend: [(u) => caption(element, u, lines)] },
      padding: [8, 18, 0, 0],
      axes: [{ ...axis, grid: { show: false }, size: 26, space: 40, incrs: [60, 120, 300, 900], values: (_, at) => at.map((t) => new Date(t * 1000).toTimeString().slice(0, 5)) }, { ...axis, size: 48, space: 26, ...(format === plain ? { incrs: whole } : {}), values: (_, values) => values.map(format) }],
      scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, element.dataset.chart === "time" ? .01 : 1) * 1.1] } },
      series: [{ label: "at", value: (_, t) => t == null ? "–" : new Date(t * 1000).toTimeString().slice(0, 8) }, ...lines.map(([, label, name, text, fills]) => ({
        label, stroke: colour(name), width: 1.5, fill: fills ? colour(name).replace(")", ", .12)").replace("rgb(", "rgba(") : undefined, points: { show: false }, spanGaps: true, value: (_, v) => text(v),
      }))],
    }, data, element);
    charts.set(element, chart);
    caption(element, chart, lines);
  };
  const fit = () => { for (const [element, chart] of charts) if (element.isConnected) chart.setSize({ width: element.clientWidth, height: element.clientHeight }); else { chart.destroy(); charts.delete(element); } };
  const redraw = () => { for (const chart of charts.values()) chart.destroy(); charts.clear(); $$(".chart").forEach(draw); };
  let sized = 0;
  addEventListener("resize", () => { clearTimeout(sized); sized = setTimeout(fit, 100); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // -- ticks ----------------------------------------------------------------------------------------------------------
  const ticked = () => $$('input[name="ids"]:checked');
  const many = (n) => `${n} task${n === 1 ? "" : "s"}`;
  const count = () => {
    const line = $("#ticked");
    if (!line) return;
    const n = ticked().length, all = $("[data-all]");
    const text = n ? `${many(n)} selected` : line.dataset.none;
    if (line.textContent !== text) line.textContent = text;
    $$("[data-needs-ticks]").forEach((button) => { button.disabled = !n; });
    if (all) { all.checked = n > 0 && n === $$('input[name="ids"]').length; all.indeterminate = n > 0 && !all.checked; }
  };
  body.addEventListener("change", (event) => {
    if (event.target.matches("[data-all]")) $$('input[name="ids"]').forEach((box) => { box.checked = event.target.checked; });
    if (event.target.matches('[data-all], [name="ids"]')) count();
    if (event.target.matches("[data-submits]")) event.target.form.requestSubmit();
  });

  // -- dialogs, notices, copying --------------------------------------------------------------------------------------
  const ask = (text) => new Promise((resolve) => {
    const dialog = $("#confirm");
    $("#confirm-text").textContent = text;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
  });
  body.addEventListener("htmx:confirm", (event) => {
    const detail = event.detail, button = detail.triggeringEvent && detail.triggeringEvent.submitter;
    const question = button && button.dataset.countConfirm ? button.dataset.countConfirm.replace("{n}", many(ticked().length)) : detail.question;
    if (!question) return;
    event.preventDefault();
    ask(question).then((yes) => { if (yes) detail.issueRequest(true); else if (button) button.focus(); });
  });
  const notice = (text, bad) => {
    const one = document.createElement("div");
    one.className = bad ? "notice is-bad" : "notice";
    one.textContent = text;
    $("#notices").append(one);
    setTimeout(() => one.remove(), bad ? 9000 : 4000);
  };
  body.addEventListener("notice", (event) => {
    notice(event.detail.text, event.detail.bad);
    if (event.detail.bad) return;
    const dialog = event.target.closest && event.target.closest("dialog");
    if (dialog) dialog.close();
    $$('input[name="ids"]:checked, [data-all]').forEach((box) => { box.checked = false; });
    count();
    want(null);
  });
  body.addEventListener("htmx:sendError", (event) => { if (!event.target.matches(".region")) notice("The platform does not answer", true); });
  body.addEventListener("click", async (event) => {
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      try { await navigator.clipboard.writeText(copy.dataset.copy); } catch { return notice("Copying needs a secure page; select the text instead", true); }
      copy.classList.add("ok");
      setTimeout(() => copy.classList.remove("ok"), 1200);
      return notice("Copied");
    }
    const opener = event.target.closest("[data-dialog]");
    if (opener) document.getElementById(opener.dataset.dialog).showModal();
    const closer = event.target.closest("[data-close]");
    if (closer) closer.closest("dialog").close();
  });

  // -- theme and shortcuts --------------------------------------------------------------------------------------------
  const themes = ["auto", "light", "dark"], store = { get: () => { try { return localStorage.getItem("sekuire-theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("sekuire-theme", v); } catch { /* private mode */ } } };
  const paint = (name) => {
    document.documentElement.style.colorScheme = name === "auto" ? "" : name;
    $("#theme").textContent = `Theme: ${name}`;
  };
  let theme = themes.includes(store.get()) ? store.get() : "auto";
  paint(theme);
  $("#theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % 3];
    store.set(theme);
    paint(theme);
    redraw();
  });
  $("#keys").addEventListener("click", () => $("#shortcuts").showModal());
  const places = { o: "/", t: "/tasks", s: "/submit", w: "/workers", a: "/approvals", p: "/policy", l: "/audit", f: "/faults", r: "/requests" };
  let went = 0;
  const step = (by) => {
    const links = $$("main tbody th a");
    if (!links.length) return;
    const here = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
    links[here < 0 ? 0 : Math.min(Math.max(here + by, 0), links.length - 1)].focus();
  };
  document.addEventListener("keydown", (event) => {
    // Enter presses the button beside a field, and not the first one of the form.
    const beside = event.key === "Enter" && event.target.matches("fieldset input") && $("button", event.target.closest("fieldset"));
    if (beside) { event.preventDefault(); beside.click(); }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
    const key = event.key;
    if (Date.now() - went < 1200 && places[key]) { location.href = `/ui${places[key]}`; return; }
    went = key === "g" ? Date.now() : 0;
    if (key === "/") { event.preventDefault(); const field = $("[data-search]"); if (field) field.focus(); else location.href = "/ui/tasks#search"; }
    else if (key === "?") $("#shortcuts").showModal();
    else if (key === "p") pause.click();
    else if (key === "j") step(1);
    else if (key === "k") step(-1);
  });

  const fresh = () => { $$(".chart").forEach((chart) => { if (!charts.has(chart)) draw(chart); }); tick(); count(); };
  body.addEventListener("htmx:afterSettle", (event) => {
    fresh();
    const wrong = event.target.matches && !event.target.dataset.topics && $('[aria-invalid="true"]', event.target);
    if (wrong) wrong.focus();
  });
  if (location.hash === "#search" && $("[data-search]")) $("[data-search]").focus();
  fresh();
  connect();
})();
