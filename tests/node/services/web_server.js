// SPDX-License-Identifier: Apache-2.0
// A web server of Node.js with 48 MiB outside of the heap of objects and about 30 in it: see web_client.py.
"use strict";
const http = require("node:http");
const bytes = Buffer.alloc(48 << 20, Uint8Array.from({ length: 4093 }, (_, n) => (n * 31) & 255));
const objects = Array.from({ length: 200000 }, (_, n) => ({ n, text: `object ${n}` }));
let served = 0;
http.createServer((request, response) => {
    const n = Number(request.url.slice(1));
    let sum = 0;
    for (let at = n; at < bytes.length; at += 4099) sum += bytes[at] * (at % 97);
    for (let at = n; at < objects.length; at += 97) sum += objects[at].n + objects[at].text.length;
    served += 1;
    const text = JSON.stringify({ n, sum, served });
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": text.length });
    response.end(text);
}).listen(Number(process.argv[2]), "127.0.0.1");
