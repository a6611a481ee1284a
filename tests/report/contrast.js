// Text whose contrast with the colour behind it is below 4.5 (WCAG AA). Colours are resolved by a canvas, which
// understands what color-mix computes to.
() => {
  const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const resolve = (colour, ground) => {
    brush.fillStyle = ground; brush.fillRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const css = (rgb) => `rgb(${rgb.join(' ')})`;
  const ground = (node) => {
    const below = node.parentElement ? ground(node.parentElement) : 'white';
    return css(resolve(getComputedStyle(node).backgroundColor, below));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest('script, style, .hidden, .skip')) continue;
    const behind = ground(node), style = getComputedStyle(node);
    const colour = node.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(resolve(colour, behind)), light(resolve(behind, 'white'))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    const name = `${node.tagName}.${node.className}: ${node.textContent.slice(0, 20)}`;
    if (contrast < 4.5) faint.push(`${name}, ${contrast.toFixed(2)}`);
  }
  return faint;
}
