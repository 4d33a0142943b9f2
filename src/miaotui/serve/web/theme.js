// Runs before the first paint, so that a remembered choice of light or dark never flashes the other one.
try {
  const theme = JSON.parse(localStorage.getItem("miaotui.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is denied or holds something else: the system's preference decides.
}
