// Everything works without this file; with it, the slider needs no button and no form is sent twice.
for (const form of document.querySelectorAll("form[data-submit-on-change]")) {
  form.classList.add("enhanced");
  form.addEventListener("change", () => form.submit());
}
for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
}
window.addEventListener("pageshow", () => {
  for (const form of document.forms) delete form.dataset.sent;
});
document.getElementById("problem")?.focus();
