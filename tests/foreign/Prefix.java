/*
 * Publishes an adapter and fetches its prefix. Needs a JDK of version 17 or later, and nothing else.
 *
 *     export PREFIX_URL=http://127.0.0.1:8080 PREFIX_API_KEY=pfx_…
 *     java Prefix.java acme/capitals@prod          # fetches what the reference names
 *     java Prefix.java acme/capitals folder        # first publishes the folder that PEFT's save_pretrained wrote
 *
 * Prints each tensor's name, dtype, shape, first element and the SHA-256 of its bytes, as JSON. On an error it prints
 * the service's reason on standard error and ends with status 1.
 */

import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.UUID;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public class Prefix {
    // The service writes the header without blanks, with these keys in this order; a JSON library reads it too.
    private static final Pattern TENSOR = Pattern.compile(
            "\"([^\"]+)\":\\{\"dtype\":\"(\\w+)\",\"shape\":(\\[[\\d,]*\\]),\"data_offsets\":\\[(\\d+),(\\d+)\\]\\}");
    private static final Pattern DETAIL = Pattern.compile("\"detail\": *\"((?:[^\"\\\\]|\\\\.)*)\"");
    private static final Pattern ESCAPED = Pattern.compile("\\\\(?:u(\\p{XDigit}{4})|(.))");

    private final HttpClient http = HttpClient.newHttpClient();
    private final String url = System.getenv().getOrDefault("PREFIX_URL", "http://127.0.0.1:8080");
    private final String key = System.getenv().getOrDefault("PREFIX_API_KEY", "");

    public static void main(String[] arguments) throws Exception {
        Prefix client = new Prefix();
        try {
            String[] names = arguments[0].split("/", 2);
            String adapter = "/v1/tenants/" + names[0] + "/adapters/" + names[1];
            if (arguments.length > 1) {
                adapter = client.publish(adapter, Path.of(arguments[1]));
            }
            byte[] rows = client.get(adapter + "/prefix?batch_size=2");
            byte[] masked = client.post(adapter + "/prefix", "{\"attention_mask\": [[0, 1, 1], [1, 1, 1]]}");
            System.out.printf("{\"adapter\": \"%s\", \"rows\": %s, \"masked\": %s}%n",
                    adapter, describe(rows), describe(masked));
        } catch (IOException error) {
            System.err.println(error);
            System.exit(1);
        }
    }

    /** Returns the path of the version that the folder has become, or was already. */
    private String publish(String adapter, Path folder) throws IOException, InterruptedException {
        String boundary = UUID.randomUUID().toString();
        List<BodyPublisher> body = new ArrayList<>();
        for (String field : List.of("adapter_config.json", "adapter_model.safetensors")) { // in this order
            body.add(BodyPublishers.ofString("--" + boundary + "\r\nContent-Disposition: form-data; name=\"" + field
                    + "\"; filename=\"" + field + "\"\r\nContent-Type: application/octet-stream\r\n\r\n"));
            body.add(BodyPublishers.ofFile(folder.resolve(field))); // read while it is sent
            body.add(BodyPublishers.ofString("\r\n"));
        }
        body.add(BodyPublishers.ofString("--" + boundary + "--\r\n"));
        HttpRequest.Builder request = request(adapter + "/versions")
                .header("Content-Type", "multipart/form-data; boundary=" + boundary)
                .POST(BodyPublishers.concat(body.toArray(BodyPublisher[]::new)));
        return send(request).headers().firstValue("Location").orElseThrow();
    }

    private byte[] get(String path) throws IOException, InterruptedException {
        return send(request(path)).body();
    }

    private byte[] post(String path, String json) throws IOException, InterruptedException {
        return send(request(path).header("Content-Type", "application/json").POST(BodyPublishers.ofString(json))).body();
    }

    private HttpRequest.Builder request(String path) {
        return HttpRequest.newBuilder(URI.create(url + path)).header("Authorization", "Bearer " + key);
    }

    private HttpResponse<byte[]> send(HttpRequest.Builder request) throws IOException, InterruptedException {
        HttpResponse<byte[]> response = http.send(request.build(), BodyHandlers.ofByteArray());
        if (response.statusCode() / 100 != 2) {
            throw new IOException(response.statusCode() + ": " + reason(response.body()));
        }
        return response;
    }

    /** Returns the `detail` of a problem document (RFC 9457); of anything else, all of it. */
    private static String reason(byte[] body) {
        String text = new String(body, StandardCharsets.UTF_8);
        Matcher detail = DETAIL.matcher(text);
        if (!detail.find()) {
            return text;
        }
        return ESCAPED.matcher(detail.group(1)).replaceAll(escaped -> Matcher.quoteReplacement(escaped.group(1) == null
                ? escaped.group(2) : Character.toString(Integer.parseInt(escaped.group(1), 16))));
    }

    /** Returns a safetensors file's tensors as JSON: eight bytes of header length, a JSON header, then the bytes. */
    private static String describe(byte[] file) throws Exception {
        ByteBuffer all = ByteBuffer.wrap(file).order(ByteOrder.LITTLE_ENDIAN);
        int data = 8 + Math.toIntExact(all.getLong(0));
        List<String> tensors = new ArrayList<>();
        Matcher header = TENSOR.matcher(new String(file, 8, data - 8, StandardCharsets.UTF_8));
        while (header.find()) {
            int start = Integer.parseInt(header.group(4));
            int stop = Integer.parseInt(header.group(5));
            ByteBuffer bytes = all.slice(data + start, stop - start).order(ByteOrder.LITTLE_ENDIAN);
            Number first = switch (header.group(2)) {
                case "F32" -> bytes.asFloatBuffer().get(0);
                case "I64" -> bytes.asLongBuffer().get(0);
                default -> null; // Java has no half precision: ask for dtype=float32
            };
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            digest.update(bytes);
            tensors.add(String.format("{\"name\": \"%s\", \"dtype\": \"%s\", \"shape\": %s, \"first\": %s, \"sha256\": \"%s\"}",
                    header.group(1), header.group(2), header.group(3), first, HexFormat.of().formatHex(digest.digest())));
        }
        return tensors.toString();
    }
}
