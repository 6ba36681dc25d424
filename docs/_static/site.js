// Blocks that scroll can be reached with the keyboard, also after the window or a tab has changed.
addEventListener("DOMContentLoaded", () => {
  const update = (block) => {
    if (block.scrollWidth > block.clientWidth) {
      block.tabIndex = 0;
    } else {
      block.removeAttribute("tabindex");
    }
  };
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target)));
  for (const block of document.querySelectorAll("div.highlight pre, .table-wrapper")) {
    update(block);
    observer.observe(block);
  }
});

// Each option links to itself, as headings do.
addEventListener("DOMContentLoaded", () => {
  for (const name of document.querySelectorAll("dt > code[id]")) {
    const link = document.createElement("a");
    link.className = "headerlink";
    link.href = `#${name.id}`;
    link.title = "Link to this option";
    link.textContent = "¶";
    name.parentElement.append(link);
  }
});

// The captions of the navigation are headings without a level.
addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll(".caption[role=heading]")) {
    caption.ariaLevel = "2";
  }
});

// The builder lays long signatures out in lists that have no terms: for a screen reader they are not lists.
addEventListener("DOMContentLoaded", () => {
  for (const part of document.querySelectorAll("dt.sig dl, dt.sig dd")) {
    part.role = "none";
  }
});
