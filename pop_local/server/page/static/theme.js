// Before anything is drawn, so that nothing flashes.
document.documentElement.style.colorScheme = localStorage.theme ?? "";
