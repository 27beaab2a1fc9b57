// Publishes an adapter and fetches its prefix. Needs Go 1.19 or later, and no module.
//
//	export PREFIX_URL=http://127.0.0.1:8080 PREFIX_API_KEY=pfx_…
//	go run prefix.go acme/capitals@prod          # fetches what the reference names
//	go run prefix.go acme/capitals folder        # first publishes the folder that PEFT's save_pretrained wrote
//
// Prints each tensor's name, dtype, shape, first element and the SHA-256 of its bytes, as JSON. On an error it prints
// the service's reason on standard error and ends with status 1.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// Tensor is one tensor of a safetensors file.
type Tensor struct {
	Name   string `json:"name"`
	Dtype  string `json:"dtype"`
	Shape  []int  `json:"shape"`
	First  any    `json:"first"`
	SHA256 string `json:"sha256"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	tenant, name, _ := strings.Cut(arguments[0], "/")
	adapter := "/v1/tenants/" + tenant + "/adapters/" + name
	if len(arguments) > 1 {
		published, err := publish(adapter, arguments[1])
		if err != nil {
			return err
		}
		adapter = published
	}
	rows, err := fetch("GET", adapter+"/prefix?batch_size=2", nil)
	if err != nil {
		return err
	}
	mask := map[string]any{"attention_mask": [][]int{{0, 1, 1}, {1, 1, 1}}}
	masked, err := fetch("POST", adapter+"/prefix", mask)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"adapter": adapter, "rows": rows, "masked": masked})
}

// publish returns the path of the version that the folder has become, or was already.
func publish(adapter, folder string) (string, error) {
	body, writer := io.Pipe() // the files are read while they are sent, in chunks
	form := multipart.NewWriter(writer)
	go func() { writer.CloseWithError(writeForm(form, folder)) }()
	header, _, err := send("POST", adapter+"/versions", form.FormDataContentType(), body)
	if err != nil {
		return "", err
	}
	return header.Get("Location"), nil
}

func writeForm(form *multipart.Writer, folder string) error {
	for _, field := range []string{"adapter_config.json", "adapter_model.safetensors"} { // in this order
		file, err := os.Open(filepath.Join(folder, field))
		if err != nil {
			return err
		}
		defer file.Close()
		part, err := form.CreateFormFile(field, field)
		if err != nil {
			return err
		}
		if _, err := io.Copy(part, file); err != nil {
			return err
		}
	}
	return form.Close()
}

func fetch(method, path string, options any) ([]Tensor, error) {
	var body io.Reader
	if options != nil {
		text, err := json.Marshal(options)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	_, file, err := send(method, path, "application/json", body)
	if err != nil {
		return nil, err
	}
	return decode(file)
}

// send returns the header and the body of a successful response, and the reason of any other as an error.
func send(method, path, contentType string, body io.Reader) (http.Header, []byte, error) {
	base := os.Getenv("PREFIX_URL")
	if base == "" {
		base = "http://127.0.0.1:8080"
	}
	request, err := http.NewRequest(method, base+path, body)
	if err != nil {
		return nil, nil, err
	}
	request.Header.Set("Authorization", "Bearer "+os.Getenv("PREFIX_API_KEY"))
	if body != nil {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body) // to its end, or the connection would not be used again
	if err != nil {
		return nil, nil, err
	}
	if response.StatusCode/100 != 2 {
		var problem struct{ Detail string } // RFC 9457
		if json.Unmarshal(answer, &problem) != nil {
			problem.Detail = string(answer)
		}
		return nil, nil, fmt.Errorf("%d: %s", response.StatusCode, problem.Detail)
	}
	return response.Header, answer, nil
}

// decode reads a safetensors file: eight bytes of header length, a JSON header, then the bytes of all tensors.
func decode(file []byte) ([]Tensor, error) {
	length := binary.LittleEndian.Uint64(file)
	data := file[8+length:]
	var entries map[string]json.RawMessage
	if err := json.Unmarshal(file[8:8+length], &entries); err != nil {
		return nil, err
	}
	delete(entries, "__metadata__")
	tensors := []Tensor{}
	for name, text := range entries {
		entry := struct {
			Dtype       string
			Shape       []int
			DataOffsets [2]int `json:"data_offsets"`
		}{}
		if err := json.Unmarshal(text, &entry); err != nil {
			return nil, err
		}
		bytes := data[entry.DataOffsets[0]:entry.DataOffsets[1]]
		digest := sha256.Sum256(bytes)
		tensors = append(tensors, Tensor{name, entry.Dtype, entry.Shape, first(entry.Dtype, bytes), hex.EncodeToString(digest[:])})
	}
	sort.Slice(tensors, func(i, j int) bool { return tensors[i].Name < tensors[j].Name })
	return tensors, nil
}

func first(dtype string, bytes []byte) any {
	switch dtype {
	case "F32":
		return math.Float32frombits(binary.LittleEndian.Uint32(bytes))
	case "I64":
		return int64(binary.LittleEndian.Uint64(bytes))
	}
	return nil // Go has no half precision: ask for dtype=float32
}
