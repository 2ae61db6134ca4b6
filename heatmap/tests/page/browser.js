// Opens the pages that `cargo test --test heatmap` writes, as a reader would: node browser.js FOLDER

import assert from "node:assert/strict";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const folder = path.resolve(process.argv[2]);
const quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", ...quiet.split(" ")],
});

/** A page that fails the test when its script does, or when it asks for anything but itself. */
async function open(name, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1360, height: 900 }, ...options });
  const page = await context.newPage();
  const address = pathToFileURL(path.join(folder, `${name}.html`)).href;
  page.problems = [];
  page.on("console", (message) => page.problems.push(message.text()));
  page.on("pageerror", (error) => page.problems.push(error.message));
  page.on("dialog", (dialog) => page.problems.push(`a dialog: ${dialog.message()}`) && dialog.dismiss());
  page.on("request", (request) => request.url() === address || page.problems.push(`asks for ${request.url()}`));
  await page.goto(address);
  await page.locator("#queries li").first().waitFor();
  return page;
}

const pixels = (page, canvas) => page.locator(canvas).first().evaluate((element) => element.toDataURL());
const numbers = (page) => page.locator("#keys .number").evaluateAll((all) => all.map((item) => Number(item.textContent)));
const sum = (all) => all.reduce((total, one) => total + one, 0);
const chosenHead = (page) => page.locator('#heads [aria-checked="true"]').innerText();
const chosenQuery = (page) => page.locator('#queries [aria-selected="true"]').innerText();
const lines = (page) => page.locator("#lines path").evaluateAll((all) => all.filter((line) => line.style.display !== "none").length);

/** How far the document reaches beyond the window. */
const overhang = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);

const tests = {
  async "a head chosen changes weights and matrix"() {
    const page = await open("large");
    const [before, matrix] = [await numbers(page), await pixels(page, "#matrix")];
    await page.locator("#heads button").nth(5).click();
    assert.equal(await chosenHead(page), "head 5");
    assert.notDeepEqual(await numbers(page), before);
    assert.notEqual(await pixels(page, "#matrix"), matrix);
    return page;
  },

  async "every layer and head of 12 x 12 x 128 can be looked at, and its rows sum to 1"() {
    const page = await open("large");
    assert.equal(await page.locator("#about").innerText(), "12 layers · 12 heads · 128 tokens");
    for (let layer = 0; layer < 12; layer++) {
      await page.locator("#layer").selectOption({ index: layer });
      assert.equal(await page.locator("#heads button").count(), 13, "twelve heads and their mean");
      for (const head of [0, layer, 12]) {
        await page.locator("#heads button").nth(head).click();
        await page.locator("#queries li").nth(10 * layer).hover();
        assert.match(await page.locator("#sum").innerText(), new RegExp(`layer ${layer} .* sums to 1\\.000`));
        assert.ok(Math.abs(sum(await numbers(page)) - 1) < 0.01);
      }
    }
    return page;
  },

  async "a token pointed at shows its weights, and lines to its keys"() {
    const page = await open("small");
    await page.locator("#queries li", { hasText: "warm" }).hover();
    assert.equal(await chosenQuery(page), "warm");
    assert.match(await page.locator("#reading-title").innerText(), /warm\s+looks at/);
    const shown = await numbers(page);
    assert.equal(shown.length, 10);
    assert.ok(Math.abs(sum(shown) - 1) < 0.001, `sum ${sum(shown)}`);
    assert.equal(await lines(page), shown.filter((weight) => weight >= 0.004 * Math.max(...shown)).length);
    const strongest = await page.locator("#strongest .number").first().innerText();
    assert.equal(Number(strongest), Math.max(...shown));
    return page;
  },

  async "a weight pointed at in the matrix is named"() {
    const page = await open("small");
    const { x, y, cell } = await page.evaluate("grid");
    await page.locator("#matrix").hover({ position: { x: x + 2.5 * cell, y: y + 4.5 * cell } });
    assert.equal(await chosenQuery(page), "the");
    const third = await page.locator("#keys .number").nth(2).innerText();
    assert.equal(await page.locator("#cell").innerText(), `the → sat: ${third}`);
    return page;
  },

  async "tokens are text, whatever they hold"() {
    const page = await open("mixed");
    assert.equal(await page.title(), "<script>");
    assert.equal(await page.locator("h1").innerText(), "<script>");
    assert.equal(await page.locator("#queries li").first().innerText(), "<script>alert(1)</script>");
    assert.equal(await page.locator("#keys bdi").nth(1).innerText(), "</script><script>alert(2)</script>");
    assert.equal(await page.locator("script").count(), 3, "data and scripts of the page");
    for (const item of await page.locator("#queries li").all()) {
      const box = await item.boundingBox();
      assert.ok(box.height < 40 && (await item.innerText()).length > 0);
    }
    assert.equal(await overhang(page), 0);
    return page;
  },

  async "rows that do not sum to 1 are said, and only where they are"() {
    const page = await open("mixed");
    assert.equal(await page.locator("#caption").isVisible(), false);
    await page.locator("#layer").selectOption("odd");
    assert.equal(await page.locator("#caption").innerText(), "1 of 2 rows doesn't sum to 1, but to 0.75");
    assert.match(await page.locator("#sum").innerText(), /sums to 0\.750/);
    return page;
  },

  async "queries and keys may be different tokens"() {
    const page = await open("mixed");
    await page.locator("#layer").selectOption("cross");
    assert.deepEqual(await page.locator("#queries li").allInnerTexts(), ["The", "cat", "sat"]);
    assert.deepEqual(await page.locator("#keys bdi").allInnerTexts(), ["mat", "because", "it", "is", "warm"]);
    return page;
  },

  async "the keyboard reaches everything"() {
    const page = await open("large");
    const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute("role"));
    const stops = [];
    for (let i = 0; i < 5; i++) {
      await page.keyboard.press("Tab");
      stops.push(await focused());
    }
    assert.deepEqual(stops, ["theme", "layer", "radio", "queries", "matrix"]);
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("ArrowRight");
    assert.match(await page.locator("#cell").innerText(), /→/);
    assert.equal(await page.locator("#spoken").textContent(), await page.locator("#cell").innerText());
    await page.keyboard.press("Shift+Tab");
    await page.keyboard.press("End");
    assert.equal(await page.locator("#queries").getAttribute("aria-activedescendant"), "query-127");
    assert.ok(await page.locator("#query-127").evaluate((item) => item.getBoundingClientRect().bottom < innerHeight + 1));
    await page.keyboard.press("ArrowUp");
    await page.keyboard.press("ArrowRight");
    assert.equal(await page.locator("#queries").getAttribute("aria-activedescendant"), "query-126");
    assert.equal(await chosenHead(page), "head 1");
    await page.keyboard.press("Shift+Tab");
    await page.keyboard.press("ArrowLeft");
    await page.keyboard.press("ArrowLeft");
    assert.equal(await chosenHead(page), "mean", "before the first comes the last");
    assert.equal(await focused(), "radio");
    return page;
  },

  async "light and dark follow the system and the button"() {
    const ground = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await open("small", { colorScheme: "dark" });
    const light = await open("small", { colorScheme: "light" });
    assert.notEqual(await ground(dark), await ground(light));
    assert.notEqual(await pixels(dark, "#heads canvas"), await pixels(light, "#heads canvas"));
    await light.getByRole("button", { name: "dark" }).click();
    assert.equal(await ground(light), await ground(dark));
    assert.equal(await pixels(light, "#heads canvas"), await pixels(dark, "#heads canvas"));
    await light.emulateMedia({ colorScheme: "dark" });
    await light.getByRole("button", { name: "light" }).click();
    assert.notEqual(await ground(light), await ground(dark));
    return light;
  },

  async "nothing is wider than a telephone"() {
    const page = await open("large", { viewport: { width: 390, height: 800 } });
    assert.equal(await overhang(page), 0);
    return page;
  },
};

let failures = 0;
for (const [law, test] of Object.entries(tests)) {
  try {
    const page = await test();
    assert.deepEqual(page.problems, [], "what the browser complains of");
    await page.context().close();
    console.log(`ok      ${law}`);
  } catch (error) {
    failures += 1;
    console.log(`FAILED  ${law}\n${error.stack}`);
  }
}
await browser.close();
process.exit(failures ? 1 : 0);
