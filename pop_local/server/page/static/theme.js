// Sets the color scheme before the browser draws the page, so that the page does not flash.
document.documentElement.style.colorScheme = localStorage.theme ?? "";
