// Shows, below each chart, the values nearest to the pointer, and a line where they are.
function wire() {
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const series = JSON.parse(svg.dataset.series);
    const readout = svg.parentNode.querySelector(".readout");
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", svg.dataset.top);
    cursor.setAttribute("y2", svg.dataset.bottom);

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
      const nearest = series.map((one) =>
        one.px.reduce((best, px, i) => (Math.abs(px - x) < Math.abs(one.px[best] - x) ? i : best), 0),
      );
      cursor.setAttribute("x1", series[0].px[nearest[0]]);
      cursor.setAttribute("x2", series[0].px[nearest[0]]);
      svg.append(cursor);
      readout.textContent = series.map((one, i) => one.name + ": " + one.text[nearest[i]]).join(" · ");
    });
    svg.addEventListener("pointerleave", () => {
      cursor.remove();
      readout.textContent = "\u00a0";
    });
  }
}
wire();
