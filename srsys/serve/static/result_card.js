// The card below a result: shows the heat map when asked, and sends the vote.
// Gradio runs this once with `element`; the HTML in `element` is replaced with every result.
const JSON_HEADERS = { 'Content-Type': 'application/json' };
const resultUrl = name => `page/${element.querySelector('.facts').dataset.result}/${name}`;

element.addEventListener('click', event => {
  const button = event.target.closest('.show-map');
  if (!button) return;
  const figure = element.querySelector('.heat');
  const show = figure.hidden;
  if (show) figure.querySelector('img').src = resultUrl('where.png');
  figure.hidden = !show;
  button.setAttribute('aria-expanded', show);
});

element.addEventListener('submit', async event => {
  event.preventDefault();
  const form = event.target, message = form.querySelector('p'), fields = new FormData(form);
  const vote = { vote: fields.get('vote'), reason: fields.get('reason'), keep: fields.has('keep') };
  message.textContent = 'Sending …';
  try {
    const response = await fetch(resultUrl('vote'), {
      method: 'POST', headers: JSON_HEADERS, body: JSON.stringify(vote),
    });
    if (response.ok) {
      message.textContent = vote.keep
        ? 'Thank you. Your picture is kept with your word.'
        : 'Thank you. Your picture is not kept.';
    } else {
      message.textContent = (await response.json()).detail;
    }
  } catch (error) {
    message.textContent = 'The server cannot be reached.';
  }
});
