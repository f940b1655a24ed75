// Files that are dropped anywhere on the page.

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");

export class Drop {
  /** `veil` lies over the page while files are above it; `take(files)` gets them. */
  constructor(veil, take) {
    document.addEventListener("dragenter", (event) => {
      if (carriesFiles(event)) veil.hidden = false;
    });
    veil.addEventListener("dragleave", () => {
      veil.hidden = true;
    });
    document.addEventListener("dragover", (event) => {
      if (carriesFiles(event)) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!carriesFiles(event)) return;
      event.preventDefault();
      take([...event.dataTransfer.files]);
    });
  }
}
