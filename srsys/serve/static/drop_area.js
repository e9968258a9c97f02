// The drop area: choosing, dropping, pasting and clicking an example all upload a file and hand its token to Gradio.
// Gradio runs this once with `element`, `props` and `trigger`.
const area = element.querySelector('.drop');
const input = element.querySelector('input');
const message = element.querySelector('.drop-message');
const MEGABYTE = 1048576;

const show = (text, isError = false) => {
  message.textContent = text;
  message.classList.toggle('bad', isError);
};

const upload = async (file, name, kind = '') => {
  if (!file) return;
  if (file.size > props.max_bytes) {
    show(`${name} is larger than the limit of ${Math.round(props.max_bytes / MEGABYTE)} MB.`, true);
    return;
  }
  show(`Reading ${name} …`);
  const form = new FormData();
  form.append('file', file, name);
  try {
    const response = await fetch('page/pictures', { method: 'POST', body: form });
    const body = await response.json();
    if (!response.ok) {
      show(body.detail, true);
      return;
    }
    show('');
    trigger('upload', { token: body.token, kind });
  } catch (error) {
    show('The server cannot be reached.', true);
  }
};

input.addEventListener('change', () => {
  const file = input.files[0];
  upload(file, file && file.name);
  input.value = '';  // so that the same file can be chosen again
});

for (const type of ['dragover', 'dragenter']) {
  area.addEventListener(type, event => {
    event.preventDefault();
    area.classList.add('over');
  });
}
area.addEventListener('dragleave', () => area.classList.remove('over'));
area.addEventListener('drop', event => {
  event.preventDefault();
  area.classList.remove('over');
  const file = event.dataTransfer.files[0];
  if (file) upload(file, file.name);
  else show('That was not a file.', true);
});

document.addEventListener('paste', event => {
  const file = event.clipboardData.files[0];
  if (!file) return;
  event.preventDefault();
  upload(file, file.name || 'pasted.png');
});

element.addEventListener('click', async event => {
  const button = event.target.closest('button[data-example]');
  if (!button) return;
  const { example, kind } = button.dataset;
  const response = await fetch(`page/examples/${example}`);
  upload(await response.blob(), example, kind);
});
