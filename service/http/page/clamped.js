// Long texts, cut until they are asked for in full.

/** A text that is cut after some lines until it is asked for in full. */
export function clamped() {
  return {
    open: false,
    long: false,
    watch(element) {
      new ResizeObserver(() => {
        if (!this.open) this.long = element.scrollHeight > element.clientHeight + 4;
      }).observe(element);
    },
    toggle() {
      this.open = !this.open;
    },
    get label() {
      return this.open ? "Show less" : "Show all";
    },
    get cut() {
      return !this.open;
    },
    get fades() {
      return this.long && !this.open;
    },
  };
}
