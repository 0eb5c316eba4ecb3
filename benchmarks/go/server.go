// A port checker in Go, as small as it can be: what the benchmarks compare with.
//
// It connects to all ports at once, a goroutine for each, and closes at once. It has none of the
// rules, limits, log lines, retries and deadlines of the real one, and says less when a port fails.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

type request struct {
	ProviderIP string `json:"provider_ip"`
	Ports      []int  `json:"ports"`
}

type result struct {
	Accessible bool    `json:"accessible"`
	Error      *string `json:"error"`
}

type answer struct {
	Success bool              `json:"success"`
	Results map[string]result `json:"results"`
	Message string            `json:"message"`
}

func checkPort(host string, port int) result {
	address := net.JoinHostPort(host, strconv.Itoa(port))
	connection, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		text := err.Error()
		return result{Error: &text}
	}
	connection.Close()
	return result{Accessible: true}
}

func checkPorts(writer http.ResponseWriter, incoming *http.Request) {
	var asked request
	body := http.MaxBytesReader(writer, incoming.Body, 64*1024)
	if err := json.NewDecoder(body).Decode(&asked); err != nil {
		http.Error(writer, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	results := make([]result, len(asked.Ports))
	var all sync.WaitGroup
	for index, port := range asked.Ports {
		all.Add(1)
		go func(index, port int) {
			defer all.Done()
			results[index] = checkPort(asked.ProviderIP, port)
		}(index, port)
	}
	all.Wait()
	told := answer{Results: make(map[string]result, len(results))}
	accessible := 0
	for index, port := range asked.Ports {
		told.Results[strconv.Itoa(port)] = results[index]
		if results[index].Accessible {
			accessible++
		}
	}
	told.Success = accessible > 0
	told.Message = fmt.Sprintf(
		"Successfully verified %d out of %d ports", accessible, len(told.Results))
	writer.Header().Set("Content-Type", "application/json")
	json.NewEncoder(writer).Encode(told)
}

func main() {
	http.HandleFunc("/check-ports", checkPorts)
	http.HandleFunc("/health", func(writer http.ResponseWriter, _ *http.Request) {
		writer.Header().Set("Content-Type", "application/json")
		writer.Write([]byte(`{"status":"ok"}`))
	})
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}
