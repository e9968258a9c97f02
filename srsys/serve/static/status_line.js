// Scrolls the status line into view when it says something outside the window.
// Gradio runs this once with `element` and `watch`.
const MARGIN = 60;  // pixels that must be visible at the bottom

watch('value', () => {
  const top = element.getBoundingClientRect().top;
  const isVisible = top >= 0 && top <= innerHeight - MARGIN;
  if (element.textContent && !isVisible) element.scrollIntoView({ block: 'center' });
});
