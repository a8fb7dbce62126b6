// Buttons that copy the command beside them.
document.querySelectorAll(".command").forEach(command => {
  const button = command.querySelector(".copy"), words = command.querySelector("pre");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(words.textContent);
    } catch {  // an older way, where the browser has or allows no other
      getSelection().selectAllChildren(words);
      document.execCommand("copy");
      getSelection().removeAllRanges();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
});
