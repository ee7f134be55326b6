// A browser starts no worker for a page opened from a disk. The search's worker is then a script in a hidden frame, with the same messages.
if (location.protocol === "file:")
  window.Worker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      frame.srcdoc = `<script>postMessage = data => frameElement.answer(data)</script><script src="${url}"></script>`
      this.window = new Promise(resolve => frame.addEventListener("load", () => resolve(frame.contentWindow)))
      document.body.append(frame)
    }

    postMessage(data) {
      this.window.then(window => window.dispatchEvent(new window.MessageEvent("message", { data })))
    }
  }
