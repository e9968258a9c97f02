// The before/after view: two pictures over each other, a slider, and a zoom to 100 %.
// Gradio runs this once with `element` and `watch`; the HTML in `element` is replaced with every picture.
const TELEPHONE_WIDTH = 800;  // pixels, as in the style sheets
const find = selector => element.querySelector(selector);
const findSlider = () => find('input[type=range]');

// Cut the restored picture off where the slider is, and draw the line there.
const paint = () => {
  const view = find('.compare'), stage = find('.stage'), sheet = find('.sheet'), after = find('.after');
  const slider = findSlider();
  if (!view || !after || !slider) return;
  for (const side of ['dw', 'dh']) {
    view.style.setProperty(`--${side}`, `${view.dataset[side] / (window.devicePixelRatio || 1)}px`);
  }
  const visibleWidth = Math.min(stage.clientWidth, sheet.clientWidth);
  const x = stage.scrollLeft + visibleWidth * slider.value / 100;
  after.style.clipPath = `inset(0 0 0 ${x}px)`;
  find('.sheet i').style.left = `${x}px`;
};

// Show the detail, one pixel of the result per pixel of the screen, or the whole picture.
const zoom = isFull => {
  const view = find('.compare'), stage = find('.stage');
  view.classList.toggle('full', isFull);
  view.classList.toggle('fit', !isFull);
  find('[data-zoom]').setAttribute('aria-pressed', isFull);
  for (const image of element.querySelectorAll('.sheet img')) {
    image.src = isFull ? image.dataset.detail : image.dataset.preview;
  }
  paint();
  if (isFull) {
    stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
  }
  paint();
};

for (const type of ['input', 'load', 'scroll']) element.addEventListener(type, paint, true);
element.addEventListener('click', event => {
  if (event.target.closest('[data-zoom]')) zoom(find('.compare').classList.contains('fit'));
});

// Dragging moves the slider, or the picture itself when it is shown at 100 %.
let drag = null;  // the pointer that is held down, and where it last was

const move = event => {
  if (!drag || event.pointerId !== drag.id) return;
  const stage = find('.stage'), sheet = find('.sheet');
  if (find('.full')) {
    stage.scrollBy(drag.x - event.clientX, drag.y - event.clientY);
    drag.x = event.clientX;
    drag.y = event.clientY;
    return;
  }
  const box = sheet.getBoundingClientRect();
  findSlider().value = Math.round(100 * (event.clientX - box.left) / box.width);
  paint();
};

element.addEventListener('pointerdown', event => {
  const sheet = event.target.closest('.sheet');
  const scrollsByTouch = event.pointerType === 'touch' && find('.full');
  if (!sheet || !findSlider() || scrollsByTouch) return;
  drag = { id: event.pointerId, x: event.clientX, y: event.clientY };
  sheet.setPointerCapture(event.pointerId);
  move(event);
});
element.addEventListener('pointermove', move);
for (const type of ['pointerup', 'pointercancel']) {
  element.addEventListener(type, () => { drag = null; });
}

watch('value', () => {
  const view = find('.compare');
  if (view && !view.classList.contains('fit')) zoom(false);
  paint();
  if (innerWidth <= TELEPHONE_WIDTH) element.scrollIntoView({ block: 'start', behavior: 'smooth' });
});
new ResizeObserver(paint).observe(element);
