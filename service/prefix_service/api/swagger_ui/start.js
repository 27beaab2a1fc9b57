// A file of its own: the page's Content-Security-Policy allows no script inside the page.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  validatorUrl: null, // or the page would send the document to validator.swagger.io
});
