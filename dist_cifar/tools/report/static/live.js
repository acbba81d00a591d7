// Replaces what the page shows when the server of `dist-cifar watch` has another version of it.
let version = null;

async function refresh() {
  try {
    const news = await (await fetch("version")).text();
    document.body.classList.remove("lost-server");
    if (version !== null && news !== version) {
      const text = await (await fetch(".")).text();
      const page = new DOMParser().parseFromString(text, "text/html");
      const open = allDetails().map((one) => one.open);
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.title = page.title;
      wire();
      allDetails().forEach((one, i) => {
        one.open = open[i] ?? one.open;
      });
    }
    version = news;
  } catch (error) {
    document.body.classList.add("lost-server");
  }
}

function allDetails() {
  return [...document.querySelectorAll("details")];
}

setInterval(refresh, Number(document.body.dataset.refreshMilliseconds));
